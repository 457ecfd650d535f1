//! A coordinator on a port of its own, clients, and workers that speak the protocol without computing.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use shanty_access::{Role, Secret};
use shanty_coordinator::{Coordinator, Options, prepare::PrepareLine};
use shanty_proto::v1::{
    coordinator_message::Message as Out, job_service_client::JobServiceClient,
    status_service_client::StatusServiceClient, worker_message::Message as In,
    worker_service_client::WorkerServiceClient, *,
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Channel};

pub struct Server {
    pub folder: PathBuf,
    pub url: String,
    shutdown: CancellationToken,
    task: JoinHandle<shanty_coordinator::Result<()>>,
}

pub fn options(folder: &std::path::Path) -> Options {
    // The child only repeats what the test prepared in the store: its answer lies beside it.
    let script = format!("cat > '{0}/request.json'; cat '{0}/answer.json'", folder.display());
    let command = ["sh", "-c", &script].map(OsString::from).to_vec();
    let mut options = Options::new(folder.join("state"), folder.join("runs"), command);
    options.listen = "127.0.0.1:0".parse().unwrap();
    // These tests are not about who asks; those of `access` are.
    options.insecure = true;
    options.protocol.gather = Duration::from_millis(50);
    options.protocol.credit = Duration::from_millis(1500);
    options
}

impl Server {
    pub async fn start(folder: &std::path::Path) -> Self {
        Self::start_with(folder, options(folder), &[]).await
    }

    /// With tokens that are let in from the start.
    pub async fn start_with(folder: &std::path::Path, options: Options, keys: &[(&Secret, Role)]) -> Self {
        let mut coordinator = Coordinator::bind(options).await.unwrap();
        for (secret, role) in keys {
            coordinator.add_key(secret, role.as_str(), *role);
        }
        let shutdown = CancellationToken::new();
        let url = coordinator.handle().url();
        let task = tokio::spawn(coordinator.serve(shutdown.clone()));
        Self { folder: folder.to_owned(), url, shutdown, task }
    }

    pub async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(self.url.clone()).unwrap().connect().await.unwrap()
    }

    pub async fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel().await)
    }

    pub async fn statuses(&self) -> StatusServiceClient<Channel> {
        StatusServiceClient::new(self.channel().await)
    }

    pub async fn status(&self, job: &str) -> JobStatus {
        let request = GetStatusRequest { job_id: job.to_owned() };
        self.statuses().await.get_status(request).await.unwrap().into_inner().status.unwrap()
    }

    /// Waits until a job's status is as wanted.
    pub async fn until(&self, job: &str, wanted: impl Fn(&JobStatus) -> bool) -> JobStatus {
        for _ in 0..1000 {
            let status = self.status(job).await;
            if wanted(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never came: {:?}", self.status(job).await);
    }

    /// Prepares real data in the job's store, and the child's answer.
    pub fn prepare(&self, rows: usize) -> String {
        let folder = &self.folder;
        let train = folder.join("train.jsonl");
        let lines: String = (0..rows)
            .map(|n| format!("{{\"text\": \"verse {n} of a song that the crew hauls to\"}}\n"))
            .collect();
        std::fs::write(&train, lines).unwrap();
        let eval = folder.join("eval.jsonl");
        std::fs::write(&eval, "{\"text\": \"a verse held out\"}\n").unwrap();
        let store = folder.join("store");
        let options = shanty_data::PrepareOptions {
            eval: Some(eval.display().to_string()),
            max_length: 32,
            packing: false,
            threads: 1,
            ..shanty_data::PrepareOptions::new(model(), train.display().to_string(), store.join("prepared"))
        };
        let summary = shanty_data::prepare(&options, &mut |_| {}).unwrap();
        let progress = PrepareLine::Progress {
            stage: "tokenises train".to_owned(),
            bytes_done: 1,
            bytes_total: 2,
            samples: 3,
        };
        let answer = [progress, PrepareLine::Done { summary }]
            .map(|line| serde_json::to_string(&line).unwrap() + "\n")
            .concat();
        std::fs::write(folder.join("answer.json"), answer).unwrap();
        serde_json::json!({
            "name": "pirate",
            "base": { "model": model() },
            "adapter": {},
            "data": { "train": train, "eval": eval, "max_length": 32, "packing": false },
            "train": { "steps": 6, "global_batch_size": 4 },
            "checkpoint": { "store": store, "every_steps": 2 },
            "cluster": { "workers": { "min": 1, "max": 2 } },
        })
        .to_string()
    }

    pub async fn submit(&self, spec_json: &str) -> String {
        let request = SubmitJobRequest { request_id: "r1".to_owned(), spec_json: spec_json.to_owned() };
        self.jobs().await.submit_job(request).await.unwrap().into_inner().job_id
    }
}

/// A folder with a tokenizer.
fn model() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/tiny-llama-14m"))
}

/// A worker's end of a session.
pub struct Sailor {
    pub client: WorkerServiceClient<Channel>,
    say: mpsc::Sender<WorkerMessage>,
    hear: Streaming<CoordinatorMessage>,
    beats: u64,
}

impl Sailor {
    pub async fn board(server: &Server, name: &str, attachment: Option<Attachment>) -> (Self, Welcome) {
        let mut client = WorkerServiceClient::new(server.channel().await);
        let (say, messages) = mpsc::channel(64);
        let hear = client.session(ReceiverStream::new(messages)).await.unwrap().into_inner();
        let mut sailor = Self { client, say, hear, beats: 0 };
        let hello = Hello {
            worker_id: name.to_owned(),
            host: "test".to_owned(),
            pid: 1,
            collective_address: format!("{name}:1"),
            attachment,
            ..Hello::default()
        };
        sailor.say(In::Hello(hello)).await;
        let Out::Welcome(welcome) = sailor.hear().await else { panic!("no welcome") };
        (sailor, welcome)
    }

    pub async fn say(&self, message: In) {
        self.say.send(WorkerMessage { message: Some(message) }).await.unwrap();
    }

    pub async fn hear(&mut self) -> Out {
        let message = tokio::time::timeout(Duration::from_secs(10), self.hear.message()).await;
        message.expect("an answer in time").unwrap().expect("a stream that lasts").message.unwrap()
    }

    /// The error that ends the stream.
    pub async fn hear_error(&mut self) -> tonic::Status {
        loop {
            match self.hear.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a word"),
                Err(status) => return status,
            }
        }
    }

    /// Loads the base, as far as the coordinator can tell.
    pub async fn load(&mut self) -> Assign {
        let Out::Assign(assign) = self.hear().await else { panic!("no assignment") };
        let ready = BaseReady {
            job_id: assign.job_id.clone(),
            attempt: assign.attempt,
            base_hash: "base".to_owned(),
            trainable_parameters: 10,
            ..BaseReady::default()
        };
        self.say(In::BaseReady(ready)).await;
        assign
    }

    pub async fn formed(&mut self) -> Form {
        loop {
            if let Out::Form(form) = self.hear().await {
                return form;
            }
        }
    }

    pub async fn told_to_leave(&mut self) -> Leave {
        loop {
            if let Out::Leave(leave) = self.hear().await {
                return leave;
            }
        }
    }

    pub async fn released(&mut self) -> Release {
        loop {
            if let Out::Release(release) = self.hear().await {
                return release;
            }
        }
    }

    /// Beats; gives the credit.
    pub async fn beat(&mut self, form: &Form, applied_step: u64) -> Option<Credit> {
        self.beats += 1;
        let beat = Beat {
            sequence: self.beats,
            phase: MemberPhase::Computing.into(),
            attachment: Some(attachment(form, applied_step)),
            ..Beat::default()
        };
        self.say(In::Beat(beat)).await;
        loop {
            if let Out::BeatAck(ack) = self.hear().await
                && ack.sequence == self.beats
            {
                return ack.credit;
            }
        }
    }

    pub async fn lease(
        &mut self,
        form: &Form,
        split: Split,
        step: u64,
        row_ids: Vec<u64>,
    ) -> Result<LeaseRowsResponse, tonic::Status> {
        let request = LeaseRowsRequest {
            job_id: form.job_id.clone(),
            attempt: form.attempt,
            generation: form.generation,
            split: split.into(),
            step,
            row_ids,
        };
        self.client.lease_rows(request).await.map(tonic::Response::into_inner)
    }

    pub async fn report(&self, form: &Form, step: u64, reduced: Announcement) {
        let report = StepReport {
            job_id: form.job_id.clone(),
            attempt: form.attempt,
            generation: form.generation,
            step,
            rank: form.rank,
            loss: 3.5,
            reduced: Some(reduced),
            gradient_norm: 0.5,
            learning_rate: 1e-3,
            seconds: 0.1,
            timings: None,
            ..StepReport::default()
        };
        self.say(In::Step(report)).await;
    }

    pub async fn left(&self, form: &Form, applied_step: u64, row_ids: Vec<u64>) {
        let left = Left {
            job_id: form.job_id.clone(),
            attempt: form.attempt,
            generation: form.generation,
            applied_step,
            state_hash: "s".to_owned(),
            kept: Some(KeptSum { step: applied_step + 1, row_ids }),
        };
        self.say(In::Left(left)).await;
    }
}

pub fn attachment(form: &Form, applied_step: u64) -> Attachment {
    Attachment {
        job_id: form.job_id.clone(),
        attempt: form.attempt,
        generation: form.generation,
        rank: form.rank,
        applied_step,
    }
}

/// Rows of a step on stage: 10 rows, 4 a step, the default seed.
pub fn rows_of(step: u64) -> Vec<u64> {
    shanty_data::order::step_rows(17, 10, 4, step).unwrap()
}
