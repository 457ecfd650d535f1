//! Errors over a real server and client.

use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{
    from_status, to_status,
    v1::{job_service_client::JobServiceClient, job_service_server::*, *},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Answers everything with an error made from the request.
struct Refuses;

fn refusal(kind: Kind) -> Diagnostic {
    Diagnostic::new("SH0201", "line 3 of `größe.jsonl` is no JSON")
        .in_file("data/größe.jsonl")
        .at_line(3)
        .at_column(17, 4)
        .hint("every line is an object: {\"text\": …}\nsee the second line")
        .kind(kind)
}

#[tonic::async_trait]
impl JobService for Refuses {
    async fn submit_job(&self, _: Request<SubmitJobRequest>) -> Result<Response<SubmitJobResponse>, Status> {
        Err(to_status(&refusal(Kind::User)))
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        Err(to_status(&Diagnostic { message: "ö".repeat(50_000), ..refusal(Kind::Internal) }))
    }

    async fn cancel_job(&self, _: Request<CancelJobRequest>) -> Result<Response<CancelJobResponse>, Status> {
        Err(to_status(&refusal(Kind::Transient)))
    }

    async fn resume_job(&self, _: Request<ResumeJobRequest>) -> Result<Response<ResumeJobResponse>, Status> {
        Err(Status::permission_denied("a proxy said no"))
    }

    async fn list_checkpoints(
        &self,
        _: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        Ok(Response::new(ListCheckpointsResponse::default()))
    }

    async fn drain_worker(
        &self,
        _: Request<DrainWorkerRequest>,
    ) -> Result<Response<DrainWorkerResponse>, Status> {
        Ok(Response::new(DrainWorkerResponse::default()))
    }

    async fn checkpoint_now(
        &self,
        _: Request<CheckpointNowRequest>,
    ) -> Result<Response<CheckpointNowResponse>, Status> {
        Ok(Response::new(CheckpointNowResponse::default()))
    }
}

#[tokio::test]
async fn errors_arrive_as_they_were_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(JobServiceServer::new(Refuses))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(server);
    let mut client = JobServiceClient::connect(format!("http://{address}")).await.unwrap();

    let status = client.submit_job(SubmitJobRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert_eq!(from_status(&status), Diagnostic { width: None, ..refusal(Kind::User) });

    let status = client.cancel_job(CancelJobRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(from_status(&status), Diagnostic { width: None, ..refusal(Kind::Transient) });

    let long = from_status(&client.list_jobs(ListJobsRequest::default()).await.unwrap_err());
    assert_eq!((long.code.as_str(), long.kind, long.line), ("SH0201", Kind::Internal, Some(3)));
    assert!(long.message.starts_with("öööö") && long.message.contains("100000 bytes"));

    let foreign = from_status(&client.resume_job(ResumeJobRequest::default()).await.unwrap_err());
    assert_eq!((foreign.code.as_str(), foreign.kind), ("SH0776", Kind::User));
    assert!(foreign.message.contains("a proxy said no"));

    assert!(client.list_checkpoints(ListCheckpointsRequest::default()).await.is_ok());

    server.abort();
}

#[tokio::test]
async fn a_coordinator_that_is_not_there_is_worth_another_try() {
    // Bound and dropped: nobody listens at this port.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let status = JobServiceClient::new(channel).list_jobs(ListJobsRequest::default()).await.unwrap_err();
    let gone = from_status(&status);
    assert_eq!((gone.code.as_str(), gone.kind), ("SH0776", Kind::Transient));
}
