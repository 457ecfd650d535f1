//! Follows a job over gRPC until it is over, and leaves out nothing on the way.

use std::{collections::HashSet, time::Duration};

use shanty_proto::v1::{
    Checkpoint, Evaluation, Event, JobState, JobStatus, ListStepsRequest, StepRecord, WatchJobRequest,
    watch_job_response::Update,
};
use tokio::{sync::watch, time::sleep};
use tonic::Code;

use crate::{
    client::{Client, wire},
    failure::{CommandResult, Failure},
    progress::{Reporter, is_over},
};

/// Steps that are looked back at a time for the end of what is known.
const BACK: u64 = 64;

/// How long to wait before a broken watch is taken up again.
const RETRY: Duration = Duration::from_millis(300);

/// What has been shown of a job so far.
pub(crate) struct Watcher<'a> {
    client: &'a Client,
    job_id: &'a str,
    /// Attempt, generation and step of the last step that was shown.
    shown: (u32, u64, u64),
    evaluations: HashSet<(u64, u64)>,
    checkpoints: HashSet<(u32, u64, u64)>,
    events: HashSet<(u64, String, String, u64)>,
    state: watch::Sender<JobState>,
}

/// Why a watch ended before the job did.
enum Break {
    Wire(tonic::Status),
    Failure(Failure),
}

impl From<tonic::Status> for Break {
    fn from(status: tonic::Status) -> Self {
        Self::Wire(status)
    }
}

impl From<Failure> for Break {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl<'a> Watcher<'a> {
    /// Watches a job from its start.
    pub(crate) fn new(client: &'a Client, job_id: &'a str) -> Self {
        Self {
            client,
            job_id,
            shown: (0, 0, 0),
            evaluations: HashSet::new(),
            checkpoints: HashSet::new(),
            events: HashSet::new(),
            state: watch::Sender::new(JobState::Unspecified),
        }
    }

    /// The job's state, as it changes.
    pub(crate) fn state(&self) -> watch::Receiver<JobState> {
        self.state.subscribe()
    }

    /// Leaves out what happened before: steps up to `from_step`, and what `status` tells of.
    pub(crate) fn skip(&mut self, from_step: u64, status: &JobStatus) {
        self.shown = (status.attempt, status.generation, from_step);
        self.evaluations
            .extend(status.evaluations.iter().filter(|one| one.step <= from_step).map(evaluation_key));
        self.checkpoints.extend(status.checkpoints.iter().map(checkpoint_key));
        self.events.extend(status.events.iter().map(event_key));
    }

    /// Shows everything until the job is over; gives its last status.
    pub(crate) async fn follow(&mut self, reporter: &mut Reporter) -> CommandResult<JobStatus> {
        loop {
            match self.follow_stream(reporter).await {
                Ok(Some(status)) => return Ok(status),
                // The coordinator may be restarting; workers go on without it, and so does the watcher.
                Ok(None) => {}
                Err(Break::Wire(status)) if is_passing(&status) => {}
                Err(Break::Wire(status)) => return Err(wire(status)),
                Err(Break::Failure(failure)) => return Err(failure),
            }
            sleep(RETRY).await;
        }
    }

    async fn follow_stream(&mut self, reporter: &mut Reporter) -> Result<Option<JobStatus>, Break> {
        let request = WatchJobRequest { job_id: self.job_id.to_owned() };
        let mut stream = self.client.status().watch_job(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            match message.update {
                Some(Update::Status(status)) => {
                    if is_over(status.state()) {
                        self.fill(status.step, (status.attempt, status.generation), reporter).await?;
                    }
                    self.show_status(&status, reporter)?;
                    if is_over(status.state()) {
                        return Ok(Some(status));
                    }
                }
                Some(Update::Step(step)) => {
                    self.fill(step.step.saturating_sub(1), (step.attempt, step.generation), reporter).await?;
                    self.show_step(&step, reporter)?;
                }
                Some(Update::Evaluation(evaluation)) => self.show_evaluation(&evaluation, reporter)?,
                Some(Update::Checkpoint(checkpoint)) => self.show_checkpoint(&checkpoint, reporter)?,
                Some(Update::Event(event)) => self.show_event(&event, reporter)?,
                None => {}
            }
        }
        Ok(None)
    }

    /// Fetches and shows the steps that the stream left out, up to `last` of an attempt and generation.
    async fn fill(&mut self, last: u64, of: (u32, u64), reporter: &mut Reporter) -> Result<(), Break> {
        let (attempt, generation, shown) = self.shown;
        let mut from = shown + 1;
        if of > (attempt, generation) {
            // It may have gone back to a checkpoint: as far as there are newer records.
            from = from.min(last + 1);
            while from > 1 {
                let before = from.saturating_sub(BACK).max(1);
                let oldest = self.list(before, 1).await?;
                from = before;
                if oldest.first().is_none_or(|step| (step.attempt, step.generation) <= (attempt, generation))
                {
                    break;
                }
            }
        }
        while from <= last {
            let limit = u32::try_from(last + 1 - from).unwrap_or(u32::MAX);
            let steps = self.list(from, limit).await?;
            let Some(end) = steps.last().map(|step| step.step) else { break };
            for step in steps.iter().filter(|step| step.step <= last) {
                self.show_step(step, reporter)?;
            }
            from = end + 1;
        }
        Ok(())
    }

    async fn list(&self, from_step: u64, limit: u32) -> Result<Vec<StepRecord>, Break> {
        let request = ListStepsRequest { job_id: self.job_id.to_owned(), from_step, limit };
        Ok(self.client.status().list_steps(request).await?.into_inner().steps)
    }

    fn show_step(&mut self, step: &StepRecord, reporter: &mut Reporter) -> CommandResult<()> {
        let (attempt, generation, last) = self.shown;
        // A lower step of a newer generation: the job went back to a checkpoint.
        let is_new = step.step > last || (step.attempt, step.generation) > (attempt, generation);
        if is_new {
            self.shown = (step.attempt, step.generation, step.step);
            reporter.step(step)?;
        }
        Ok(())
    }

    fn show_status(&mut self, status: &JobStatus, reporter: &mut Reporter) -> CommandResult<()> {
        reporter.status(status);
        self.state.send_replace(status.state());
        for evaluation in &status.evaluations {
            self.show_evaluation(evaluation, reporter)?;
        }
        for checkpoint in &status.checkpoints {
            self.show_checkpoint(checkpoint, reporter)?;
        }
        for event in &status.events {
            self.show_event(event, reporter)?;
        }
        Ok(())
    }

    fn show_evaluation(&mut self, evaluation: &Evaluation, reporter: &Reporter) -> CommandResult<()> {
        if self.evaluations.insert(evaluation_key(evaluation)) {
            reporter.evaluation(evaluation)
        } else {
            Ok(())
        }
    }

    fn show_checkpoint(&mut self, checkpoint: &Checkpoint, reporter: &Reporter) -> CommandResult<()> {
        if self.checkpoints.insert(checkpoint_key(checkpoint)) {
            reporter.checkpoint(checkpoint)
        } else {
            Ok(())
        }
    }

    fn show_event(&mut self, event: &Event, reporter: &mut Reporter) -> CommandResult<()> {
        if self.events.insert(event_key(event)) { reporter.event(event) } else { Ok(()) }
    }
}

fn evaluation_key(evaluation: &Evaluation) -> (u64, u64) {
    (evaluation.step, evaluation.loss.to_bits())
}

fn checkpoint_key(checkpoint: &Checkpoint) -> (u32, u64, u64) {
    (checkpoint.attempt, checkpoint.step, checkpoint.generation)
}

fn event_key(event: &Event) -> (u64, String, String, u64) {
    (event.unix_ms, event.kind.clone(), event.worker_id.clone(), event.step)
}

/// Whether a broken stream may be taken up again.
fn is_passing(status: &tonic::Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DataLoss)
}
