//! Every call that there is, by everybody who may not make it.

use std::{collections::BTreeSet, time::Duration};

use http::uri::PathAndQuery;
use prost::Message;
use prost_types::FileDescriptorSet;
use shanty_access::{Channel, Credentials, Role};
use shanty_coordinator::access::RIGHTS;
use shanty_proto::{from_status, v1::FILE_DESCRIPTOR_SET};
use tonic::{Code, Request, Status, client::Grpc};
use tonic_prost::ProstCodec;

use super::{closed, connect, start};

/// Calls that the descriptors know: our own, and those of the two services of others on the same port.
fn calls() -> BTreeSet<String> {
    let sets = [
        FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    ];
    let mut calls = BTreeSet::new();
    for set in sets {
        for file in FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                calls.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
            }
        }
    }
    calls
}

/// Makes a call with an empty message; what it is refused with, if it is.
async fn call(channel: Channel, path: &str) -> Option<Status> {
    let path: PathAndQuery = path.parse().unwrap();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    // Whatever kind of call it is, its first message is empty and its answers are streamed.
    let answered = grpc.server_streaming(Request::new(()), path, ProstCodec::<(), ()>::default()).await;
    let mut answers = match answered {
        Ok(response) => response.into_inner(),
        Err(status) => return Some(status),
    };
    // A call that was let in may have nothing to say for a while.
    match tokio::time::timeout(Duration::from_millis(200), answers.message()).await {
        Ok(Err(status)) => Some(status),
        Ok(Ok(_)) | Err(_) => None,
    }
}

fn is_refused(status: Option<&Status>) -> bool {
    status.is_some_and(|status| matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied))
}

#[tokio::test]
async fn every_call_is_refused_without_rights_and_with_each_role_that_is_too_little() {
    let calls = calls();
    let rows: BTreeSet<String> = RIGHTS.iter().map(|(call, _)| (*call).to_owned()).collect();
    assert_eq!(rows, calls, "each call has a row in the table of rights, and each row is of a call");
    assert!(calls.len() >= 18, "the descriptors were read");

    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let nobody = Credentials { token: None, ..Credentials::default() };
    let stranger = super::with_token(&shanty_access::NewToken::draw().unwrap().secret);
    let (mut refused, mut allowed) = (0, 0);
    for (path, least) in RIGHTS {
        for (who, credentials) in [("nobody", &nobody), ("a stranger", &stranger)] {
            let status = call(connect(&server, credentials).await.unwrap(), path).await;
            let status = status.unwrap_or_else(|| panic!("{path} is open to {who}"));
            assert_eq!(status.code(), Code::Unauthenticated, "{path} by {who}: {status:?}");
            assert_eq!(from_status(&status).code, "SH0740");
            refused += 1;
        }
        for role in Role::ALL {
            let status = call(connect(&server, &keys.of(role)).await.unwrap(), path).await;
            if role.may(*least) {
                // Empty messages make no sense, but whoever may ask is told so by the service, not by the door.
                assert!(!is_refused(status.as_ref()), "{path} by {role}: {status:?}");
                allowed += 1;
            } else {
                let status = status.unwrap_or_else(|| panic!("{path} is open to {role}"));
                assert_eq!(status.code(), Code::PermissionDenied, "{path} by {role}: {status:?}");
                assert_eq!(from_status(&status).code, "SH0741");
                refused += 1;
            }
        }
    }
    assert!(refused > 3 * RIGHTS.len() && allowed > RIGHTS.len(), "{refused} refused, {allowed} allowed");
    // A call that the table does not know is refused to everybody.
    let status =
        call(connect(&server, &keys.of(Role::Admin)).await.unwrap(), "/shanty.v1.JobService/DropAll").await;
    assert_eq!(status.unwrap().code(), Code::PermissionDenied);
    server.stop().await;
}

#[tokio::test]
async fn headers_that_are_no_token_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _) = start(folder.path(), closed(folder.path())).await;
    let plain = tonic::transport::Channel::from_shared(server.url.clone()).unwrap().connect().await.unwrap();
    for header in
        ["", "Bearer", "Bearer ", "Basic YWRtaW46YWRtaW4=", "bearer shanty-000000000000-0", "Bearer admin"]
    {
        let mut jobs = shanty_proto::v1::job_service_client::JobServiceClient::new(plain.clone());
        let mut request = Request::new(shanty_proto::v1::ListJobsRequest {});
        request.metadata_mut().insert("authorization", header.parse().unwrap());
        assert_eq!(jobs.list_jobs(request).await.unwrap_err().code(), Code::Unauthenticated, "{header:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn everybody_is_told_who_they_are_and_what_they_may_do() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    for (role, may, may_not) in [
        (Role::Read, "/shanty.v1.StatusService/WatchJob", "/shanty.v1.JobService/CancelJob"),
        (Role::Submit, "/shanty.v1.JobService/CancelJob", "/shanty.v1.JobService/DrainWorker"),
        (Role::Admin, "/shanty.v1.JobService/DrainWorker", "/shanty.v1.JobService/DropAll"),
    ] {
        let channel = connect(&server, &keys.of(role)).await.unwrap();
        let mut access = shanty_proto::v1::access_service_client::AccessServiceClient::new(channel);
        let who = access.who_am_i(shanty_proto::v1::WhoAmIRequest {}).await.unwrap().into_inner();
        assert_eq!((who.name.as_str(), who.asks), (role.as_str(), true));
        assert!(who.calls.iter().any(|call| call == may), "{role}: {:?}", who.calls);
        assert!(!who.calls.iter().any(|call| call == may_not), "{role}");
    }
    server.stop().await;
}
