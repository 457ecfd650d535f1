//! Data from web servers, plain and compressed, and what can go wrong on the way.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use shanty_data::{Split, TrainData, TrainSource};
use shanty_diagnostic::Diagnose;
use shanty_remote::testing::{Reply, Server, serve_file};

use crate::helpers::Bench;

fn lines(count: usize) -> String {
    (0..count)
        .map(|line| format!("{{\"text\": \"verse {line} of a song that the crew hauls to\"}}\n"))
        .collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

/// A bench whose data lies on a server under some name.
fn served(name: &'static str, bytes: Vec<u8>) -> (Bench, Server) {
    let server = Server::start(move |request| match request.path().trim_start_matches('/') == name {
        true => serve_file(request, &bytes, "v1"),
        false => Reply::new(404, "no such thing"),
    });
    let mut bench = Bench::new();
    bench.options.train = format!("{}/{name}", server.url()).into();
    (bench, server)
}

#[test]
fn rows_of_a_server_are_those_of_the_file() {
    let text = lines(3000);
    let local = Bench::new().train(&text);
    let (expected, rows) = local.rows();
    let forms: [(&str, Vec<u8>); 4] = [
        ("a.jsonl", text.clone().into()),
        ("b.jsonl.gz", gzip(text.as_bytes())),
        ("c.jsonl.zst", zstd::encode_all(text.as_bytes(), 1).unwrap()),
        // Two members, as `cat a.gz b.gz` makes them.
        ("d.jsonl.gz", [gzip(&text.as_bytes()[..100]), gzip(&text.as_bytes()[100..])].concat()),
    ];
    for (name, bytes) in forms {
        let (bench, server) = served(name, bytes.clone());
        let (summary, remote) = bench.rows();
        assert!(remote == rows, "{name}: the rows are the same");
        assert_eq!(summary.hash, expected.hash, "{name}");
        assert!(
            server
                .asked()
                .iter()
                .all(|request| request.method != "GET" || !request.header("range").is_empty()),
            "{name}"
        );
        // Again: nothing is read, the tag says enough.
        server.forget();
        assert_eq!(bench.prepare().unwrap(), summary);
        assert!(
            server
                .asked()
                .iter()
                .all(|request| request.method == "HEAD" || request.header("range") == "bytes=0-0"),
            "{name}"
        );
        let prepared = shanty_data::Prepared::open(&bench.options.out).unwrap();
        let source = &prepared.samples_of_row(Split::Train, 0).unwrap()[0];
        assert_eq!(source.to_string(), format!("{}/{name}:{}", server.url(), source.line));
        // The same from the disk.
        let mut on_disk = Bench::new();
        on_disk.options.train = on_disk.write(name, bytes).to_str().unwrap().into();
        assert_eq!(on_disk.prepare().unwrap().hash, expected.hash, "{name}");
    }
}

#[test]
fn parquet_of_a_server_is_read_in_parts() {
    let mut local = Bench::new();
    let path = crate::parquet_files::text_file(&local, 20_000);
    local.options.train = path.clone().into();
    let expected = local.prepare().unwrap();
    let bytes = std::fs::read(path).unwrap();
    let size = bytes.len();
    let (bench, server) = served("t.parquet", bytes);
    assert_eq!(bench.prepare().unwrap().hash, expected.hash);
    let asked = server.asked();
    assert!(asked.iter().all(|request| request.method == "HEAD" || !request.header("range").is_empty()));
    // Columns, then rows: the blocks of this small file are asked for at most twice.
    assert!(asked.len() < 30, "{} requests for {size} bytes", asked.len());
    let plain = Server::start(|_| Reply::new(200, "PAR1 and more"));
    let mut bench = Bench::new();
    bench.options.train = format!("{}/t.parquet", plain.url()).into();
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0228");
}

#[test]
fn what_is_wrong_on_the_way_is_told_by_the_address() {
    let (mut bench, server) = served("a.jsonl", lines(10).into());
    bench.options.train = format!("{}/b.jsonl", server.url()).into();
    let error = bench.prepare().unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0224", "{error:?}");
    assert!(error.message.contains("/b.jsonl"), "{error:?}");

    let mut broken = lines(3);
    broken.push_str("{\"text\": 5}\n");
    let (bench, server) = served("a.jsonl", broken.into());
    let error = bench.prepare().unwrap_err().diagnostic();
    assert_eq!((error.code.as_str(), error.line), ("SH0207", Some(4)), "{error:?}");
    assert_eq!(error.file, Some(format!("{}/a.jsonl", server.url()).into()));

    let packed = gzip(lines(5000).as_bytes());
    let (bench, _server) = served("a.jsonl.gz", packed[..packed.len() / 2].to_vec());
    let error = bench.prepare().unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0201", "{error:?}");
    let (bench, _server) = served("a.jsonl.zst", b"not compressed at all".to_vec());
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0201");
    assert!(!bench.options.out.exists());
}

#[test]
fn data_that_changes_while_it_is_prepared_is_refused() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let server = Server::start(move |request| {
        // The first four are the questions for size and ranges; then somebody writes.
        let tag = if count.fetch_add(1, Ordering::SeqCst) < 6 { "v1" } else { "v2" };
        serve_file(request, lines(10).as_bytes(), tag)
    });
    let mut bench = Bench::new();
    bench.options.train = format!("{}/a.jsonl", server.url()).into();
    let error = bench.prepare().unwrap_err().diagnostic();
    assert!(["SH0227", "SH0201"].contains(&error.code.as_str()), "{error:?}");
    assert!(error.message.contains("changed while it was read"), "{error:?}");
    assert!(!bench.options.out.exists());
}

#[test]
fn servers_and_disk_are_mixed() {
    let (mut bench, server) = served("a.jsonl", lines(20).into());
    let local = bench.write("b.jsonl", lines(20)).to_str().unwrap().to_owned();
    let source = |path: String, weight| TrainSource { path, format: None, weight: Some(weight) };
    bench.options.packing = false;
    bench.options.train =
        TrainData(vec![source(format!("{}/a.jsonl", server.url()), 3.0), source(local, 1.0)]);
    let summary = bench.prepare().unwrap();
    assert_eq!(
        summary.train.sources.iter().map(|source| source.rows_per_epoch).collect::<Vec<_>>(),
        [30, 10]
    );
}
