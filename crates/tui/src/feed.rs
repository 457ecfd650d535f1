//! Asks the coordinator, for as long as somebody wants to know; comes back when the connection broke.
//!
//! Nothing queues up: each question is asked again only after its answer, and a stream that nobody reads stands still,
//! for which the coordinator leaves steps out.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use shanty_access::Channel;
use shanty_proto::v1::{
    GetStatusRequest, JobStatus, ListEventsRequest, ListJobsRequest, ListStepsRequest, TailLogsRequest,
    WatchJobRequest, job_service_client::JobServiceClient, status_service_client::StatusServiceClient,
    watch_job_response::Update,
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tonic::{Code, Status};

use crate::{state::News, words::is_over};

/// Opens a connection to the coordinator, or says why not.
pub type Connect = Arc<dyn Fn() -> Connecting + Send + Sync>;
/// A connection on its way.
pub type Connecting = Pin<Box<dyn Future<Output = Result<Channel, String>> + Send>>;

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// First pause before the next try of a connection; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// Steps of a curve, at most: more than a wide terminal has dots.
const STEPS: u32 = 2000;
/// Largest answer.
const LARGEST_ANSWER: usize = 64 << 20;

/// Brings news.
pub struct Feed {
    /// Opens connections.
    pub connect: Connect,
    /// Takes the news.
    pub news: mpsc::Sender<News>,
    /// The job that is watched; ends with its sender.
    pub wanted: watch::Receiver<Option<String>>,
    /// How often to ask.
    pub every: Duration,
}

/// Why a connection is given up.
enum End {
    /// It broke.
    Broken(String),
    /// Nobody wants news any more.
    Unwanted,
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Broken(shanty_proto::from_status(&status).message)
    }
}

impl<T> From<mpsc::error::SendError<T>> for End {
    fn from(_: mpsc::error::SendError<T>) -> Self {
        Self::Unwanted
    }
}

impl Feed {
    /// Brings news until nobody wants any.
    pub async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let end = match (self.connect)().await {
                Ok(channel) => {
                    pause = FIRST_PAUSE;
                    self.serve(channel).await
                }
                Err(reason) => End::Broken(reason),
            };
            let End::Broken(reason) = end else { return };
            if self.news.send(News::Lost(reason)).await.is_err() {
                return;
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Asks over one connection, about whichever job is wanted.
    async fn serve(&mut self, channel: Channel) -> End {
        loop {
            let job = self.wanted.borrow_and_update().clone();
            let asking = Asking { channel: channel.clone(), news: self.news.clone(), every: self.every };
            tokio::select! {
                Err(end) = asking.ask(job) => return end,
                changed = self.wanted.changed() => if changed.is_err() { return End::Unwanted },
            }
        }
    }
}

/// Questions over one connection.
struct Asking {
    channel: Channel,
    news: mpsc::Sender<News>,
    every: Duration,
}

impl Asking {
    fn status(&self) -> StatusServiceClient<Channel> {
        StatusServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    async fn ask(&self, job: Option<String>) -> Result<(), End> {
        let Some(job) = job else { return self.ask_for_jobs().await };
        let (at_work, over) = watch::channel(true);
        tokio::try_join!(
            self.ask_for_jobs(),
            self.ask_for_status(&job, &at_work),
            self.follow(&job, over.clone()),
            self.follow_logs(&job, over),
        )?;
        Ok(())
    }

    async fn ask_for_jobs(&self) -> Result<(), End> {
        let mut jobs = JobServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        loop {
            let answer = in_time(jobs.list_jobs(ListJobsRequest {})).await?;
            self.news.send(News::Connected).await?;
            self.news.send(News::Jobs(answer.into_inner().jobs)).await?;
            sleep(self.every).await;
        }
    }

    async fn ask_for_status(&self, job: &str, at_work: &watch::Sender<bool>) -> Result<(), End> {
        loop {
            let request = GetStatusRequest { job_id: job.to_owned() };
            match in_time(self.status().get_status(request)).await {
                Ok(answer) => {
                    if let Some(status) = answer.into_inner().status {
                        at_work.send_replace(!is_over(status.state()));
                        self.tell_status(status).await?;
                    }
                }
                Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => {
                    let reason = shanty_proto::from_status(&status).message;
                    self.news.send(News::NoSuchJob(reason)).await?;
                }
                Err(status) => return Err(status.into()),
            }
            sleep(self.every).await;
        }
    }

    async fn tell_status(&self, status: JobStatus) -> Result<(), End> {
        Ok(self.news.send(News::Status(Box::new(status))).await?)
    }

    /// What happens as it happens, and what happened before.
    async fn follow(&self, job: &str, mut at_work: watch::Receiver<bool>) -> Result<(), End> {
        loop {
            // Begun before the past is asked for, so that nothing falls between the two.
            let request = WatchJobRequest { job_id: job.to_owned(), ..WatchJobRequest::default() };
            let Some(mut stream) = found(in_time(self.status().watch_job(request)).await)? else {
                return std::future::pending().await;
            };
            let request = ListStepsRequest {
                job_id: job.to_owned(),
                from_step: 0,
                limit: STEPS,
                ..ListStepsRequest::default()
            };
            let steps = in_time(self.status().list_steps(request)).await?.into_inner().steps;
            self.news.send(News::History(steps)).await?;
            let request = ListEventsRequest { job_id: job.to_owned() };
            let events = in_time(self.status().list_events(request)).await?.into_inner().events;
            self.news.send(News::Events(events)).await?;
            while let Some(message) = stream.message().await? {
                let Some(update) = message.update else { continue };
                let news = match update {
                    Update::Status(status) => News::Status(Box::new(status)),
                    Update::Step(step) => News::Step(step),
                    Update::Evaluation(evaluation) => News::Evaluation(evaluation),
                    Update::Checkpoint(checkpoint) => News::Checkpoint(checkpoint),
                    Update::Event(event) => News::Event(event),
                    // Not asked for: whole statuses are asked for as often.
                    Update::Pulse(_) => continue,
                };
                self.news.send(news).await?;
            }
            until_resumed(&mut at_work).await;
        }
    }

    async fn follow_logs(&self, job: &str, mut at_work: watch::Receiver<bool>) -> Result<(), End> {
        loop {
            let request =
                TailLogsRequest { job_id: job.to_owned(), follow: true, ..TailLogsRequest::default() };
            let Some(mut stream) = found(in_time(self.status().tail_logs(request)).await)? else {
                return std::future::pending().await;
            };
            self.news.send(News::LogsBegin).await?;
            while let Some(message) = stream.message().await? {
                self.news.send(News::Logs(message.lines)).await?;
            }
            until_resumed(&mut at_work).await;
        }
    }
}

/// An answer, unless there is no such job, of which the status tells.
fn found<T>(answer: Result<tonic::Response<T>, Status>) -> Result<Option<T>, End> {
    match answer {
        Ok(answer) => Ok(Some(answer.into_inner())),
        Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => Ok(None),
        Err(status) => Err(status.into()),
    }
}

/// Streams of a job end with it; the next attempt has streams of its own.
async fn until_resumed(at_work: &mut watch::Receiver<bool>) {
    // A stream may end a moment before the status tells why.
    if at_work.wait_for(|at_work| !at_work).await.is_err()
        || at_work.wait_for(|at_work| *at_work).await.is_err()
    {
        std::future::pending().await
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(ANSWER_WITHIN, answer).await.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(format!("no answer within {} s", ANSWER_WITHIN.as_secs())))
    })
}

/// All that one page takes, asked for once.
///
/// # Errors
/// Why it cannot be had, in words.
pub async fn once(channel: Channel, job: Option<&str>) -> Result<Vec<News>, String> {
    ask_once(channel, job).await.map_err(|status| shanty_proto::from_status(&status).message)
}

async fn ask_once(channel: Channel, job: Option<&str>) -> Result<Vec<News>, Status> {
    let mut jobs = JobServiceClient::new(channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
    let listed = in_time(jobs.list_jobs(ListJobsRequest {})).await?.into_inner().jobs;
    let mut news = vec![News::Connected, News::Jobs(listed)];
    let Some(job_id) = job.map(str::to_owned) else { return Ok(news) };
    let mut status = StatusServiceClient::new(channel).max_decoding_message_size(LARGEST_ANSWER);
    let request = GetStatusRequest { job_id: job_id.clone() };
    let now = in_time(status.get_status(request)).await?.into_inner().status.unwrap_or_default();
    news.push(News::Status(Box::new(now)));
    let request = ListStepsRequest {
        job_id: job_id.clone(),
        from_step: 0,
        limit: STEPS,
        ..ListStepsRequest::default()
    };
    news.push(News::History(in_time(status.list_steps(request)).await?.into_inner().steps));
    let request = ListEventsRequest { job_id: job_id.clone() };
    news.push(News::Events(in_time(status.list_events(request)).await?.into_inner().events));
    let request = TailLogsRequest { job_id, ..TailLogsRequest::default() };
    let mut lines = in_time(status.tail_logs(request)).await?.into_inner();
    while let Some(message) = in_time(lines.message()).await? {
        news.push(News::Logs(message.lines));
    }
    Ok(news)
}
