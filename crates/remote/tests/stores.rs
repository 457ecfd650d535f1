//! Object stores and web servers, against a server that speaks S3's requests.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use shanty_diagnostic::{Diagnose, Kind};
use shanty_remote::{
    Environment, Error, Object, expand, expand_in,
    testing::{Reply, Request, Server, serve_file},
};

fn pointing_at(server: &Server) -> Environment {
    Environment::of([
        ("AWS_ACCESS_KEY_ID", "AKIATEST"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ENDPOINT", server.url().as_str()),
        ("AWS_ALLOW_HTTP", "true"),
    ])
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

/// The bucket `crew` with some objects, listed two a page.
fn bucket(request: &Request) -> Reply {
    let signed = request.header("authorization");
    if !(signed.contains("AWS4-HMAC-SHA256") && signed.contains("Credential=AKIATEST/")) {
        return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>");
    }
    if request.path() == "/crew" {
        let keys = ["data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl", "data/d.txt", "data/e.jsonl"];
        let from: usize = match request.target.split("continuation-token=").nth(1) {
            Some(token) => token.split('&').next().unwrap().parse().unwrap(),
            None => 0,
        };
        let page: String = keys[from..(from + 2).min(keys.len())]
            .iter()
            .map(|key| {
                format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-11-24T12:00:00.000Z</LastModified>\
                     <ETag>\"e\"</ETag><Size>5</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
            })
            .collect();
        let more = match from + 2 < keys.len() {
            true => format!(
                "<IsTruncated>true</IsTruncated><NextContinuationToken>{}</NextContinuationToken>",
                from + 2
            ),
            false => "<IsTruncated>false</IsTruncated>".to_owned(),
        };
        return Reply::new(
            200,
            format!("<?xml version=\"1.0\"?><ListBucketResult>{page}{more}</ListBucketResult>"),
        );
    }
    match request.path() {
        "/crew/large" => serve_file(request, &content(20 << 20), "v1"),
        "/crew/empty" => serve_file(request, b"", "v0"),
        "/crew/secret" => {
            Reply::new(403, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        }
        _ => {
            Reply::new(404, "<Error><Code>NoSuchKey</Code><Message>The key does not exist</Message></Error>")
        }
    }
}

#[test]
fn s3_objects_are_read_in_signed_ranges() {
    let server = Server::start(bucket);
    let environment = pointing_at(&server);
    let object = Object::open_in("s3://crew/large", &environment).unwrap();
    assert_eq!((object.size(), object.version().as_str()), (20 << 20, "etag \"v1\""));
    assert_eq!(object.range(5..9).unwrap(), content(9)[5..]);
    server.forget();
    let mut read = Vec::new();
    object.reader().read_to_end(&mut read).unwrap();
    assert!(read == content(20 << 20), "the bytes are those of the object");
    let ranges: Vec<String> =
        server.asked().iter().map(|request| request.header("range").to_owned()).collect();
    assert_eq!(ranges, ["bytes=0-8388607", "bytes=8388608-16777215", "bytes=16777216-20971519"]);
    assert!(server.asked().iter().all(|request| request.header("if-match") == "\"v1\""));
    let mut read = Vec::new();
    Object::open_in("s3://crew/empty", &environment).unwrap().reader().read_to_end(&mut read).unwrap();
    assert!(read.is_empty());
}

#[test]
fn globs_list_all_pages_and_do_not_cross_folders() {
    let server = Server::start(bucket);
    let environment = pointing_at(&server);
    let found = expand_in("s3://crew/data/*.jsonl", &environment).unwrap();
    assert_eq!(found, ["s3://crew/data/a.jsonl", "s3://crew/data/b.jsonl", "s3://crew/data/e.jsonl"]);
    assert_eq!(server.asked().len(), 3, "five keys, two a page");
    assert!(server.asked()[0].target.contains("prefix=data%2F"), "{}", server.asked()[0].target);
    assert_eq!(expand_in("s3://crew/data/a.jsonl", &environment).unwrap(), ["s3://crew/data/a.jsonl"]);
    let error = expand_in("s3://crew/data/*.parquet", &environment).unwrap_err();
    assert_eq!(error.diagnostic().code, "SH0224", "{error}");
}

#[test]
fn what_a_store_refuses_has_its_code_and_its_hint() {
    let server = Server::start(bucket);
    let environment = pointing_at(&server);
    let denied = Object::open_in("s3://crew/secret", &environment).unwrap_err().diagnostic();
    assert_eq!((denied.code.as_str(), denied.kind), ("SH0225", Kind::User), "{denied:?}");
    assert!(denied.hint.unwrap().contains("AWS_ACCESS_KEY_ID"));
    let missing = Object::open_in("s3://crew/none", &environment).unwrap_err().diagnostic();
    assert_eq!(missing.code, "SH0224", "{missing:?}");
    for (url, says) in
        [("s3:///key", "no bucket"), ("ftp://host/a", "none of"), ("http://", ""), ("s3://*/a", "")]
    {
        let error = expand(url).and_then(|found| Object::open(&found[0]).map(drop)).unwrap_err().diagnostic();
        assert_eq!(error.code, "SH0223", "{url}: {error:?}");
        assert!(error.message.contains(says), "{url}: {error:?}");
    }
    let error = expand("https://host/*.jsonl").unwrap_err().diagnostic();
    assert!(error.message.contains("lists no files"), "{error:?}");
}

#[test]
fn servers_that_fail_for_a_while_are_asked_again() {
    let failures = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&failures);
    let server = Server::start(move |request| {
        match request.method == "GET" && count.fetch_add(1, Ordering::SeqCst) < 2 {
            true => Reply::new(503, "busy"),
            false => serve_file(request, b"abcdef", "v1"),
        }
    });
    let object = Object::open(&format!("{}/x.jsonl", server.url())).unwrap();
    assert_eq!(&object.range(2..4).unwrap()[..], b"cd");
    assert!(failures.load(Ordering::SeqCst) >= 3);
}

#[test]
fn an_object_that_changes_under_the_reader_is_noticed() {
    let replaced = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&replaced);
    let server = Server::start(move |request| match seen.load(Ordering::SeqCst) {
        0 => serve_file(request, b"first", "v1"),
        _ => serve_file(request, b"later", "v2"),
    });
    let object = Object::open(&format!("{}/x.jsonl", server.url())).unwrap();
    replaced.store(1, Ordering::SeqCst);
    let error = object.range(0..3).unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    let error = object.reader().read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(Error::inside(error).unwrap().diagnostic().code, "SH0227");
}

#[test]
fn web_servers_without_ranges_are_read_from_start_to_end() {
    let bytes = content(3 << 20);
    let served = bytes.clone();
    let server = Server::start(move |request| match request.path() {
        "/plain" => Reply::new(200, served.clone()),
        _ => Reply::new(404, "nothing here"),
    });
    let object = Object::open(&format!("{}/plain", server.url())).unwrap();
    assert!(!object.serves_ranges());
    assert!(matches!(object.range(1..2), Err(Error::NoRanges { .. })));
    let mut read = Vec::new();
    object.reader().read_to_end(&mut read).unwrap();
    assert!(read == bytes);
    let error = Object::open(&format!("{}/other", server.url())).unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0224", "{error:?}");
}

#[test]
fn signatures_in_addresses_are_sent_and_not_shown() {
    let server = Server::start(|request| match request.target.contains("sig=s3cret") {
        true => serve_file(request, b"abc", "v"),
        false => Reply::new(403, "no signature"),
    });
    let object = Object::open(&format!("{}/x.jsonl?sig=s3cret", server.url())).unwrap();
    assert_eq!(&object.range(0..3).unwrap()[..], b"abc");
    assert!(!object.url().contains("s3cret"), "{}", object.url());
    let error = Object::open(&format!("{}/x.jsonl?sig=wr0ng", server.url())).unwrap_err();
    assert_eq!(error.diagnostic().code, "SH0225");
    assert!(!format!("{error} {:?}", error.diagnostic()).contains("wr0ng"), "{error}");
}

#[test]
fn nobody_at_home_is_told_as_such() {
    let server = Server::start(|_| Reply::new(200, ""));
    let url = format!("{}/x.jsonl", server.url());
    drop(server);
    // The port is free again once the listener is gone; its thread ends with the connection that drop makes.
    let error = Object::open(&url).unwrap_err().diagnostic();
    assert_eq!((error.code.as_str(), error.kind), ("SH0226", Kind::Transient), "{error:?}");
}
