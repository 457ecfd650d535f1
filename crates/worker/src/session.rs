//! The session with the coordinator: one stream, beats, credit, and what trainer and coordinator tell each other.
//!
//! The session never waits for the trainer. `Leave` interrupts it at once; everything else goes through channels.
//! When the stream breaks the trainer goes on with the credit and the rows it holds, and the session connects again
//! and re-attaches.

mod outbox;

use std::{
    sync::{Arc, mpsc::Sender},
    time::Duration,
};

use shanty_access::Channel;
use shanty_proto::v1::{
    Attachment, Beat, CoordinatorMessage, Draining, Goodbye, Hello, LogLine, LogLines, Welcome,
    WorkerMessage, coordinator_message::Message as FromCoordinator, worker_message::Message,
    worker_service_client::WorkerServiceClient,
};
use tokio::{
    sync::mpsc::{self, Receiver, UnboundedReceiver, UnboundedSender},
    time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use crate::{Error, control::Control, trainer::Command};

use outbox::Outbox;

/// First pause between two attempts to connect; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest such pause: a restarted coordinator has its crew back within five seconds.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long the coordinator may take to say `Welcome`.
const WELCOME_WITHIN: Duration = Duration::from_secs(5);
/// A report of a step this close to the end of the credit is followed by a beat at once.
const LOW_CREDIT_STEPS: u64 = 3;

/// Code of a stream's end when the rights are over that it was let in by.
const RIGHTS_ENDED: &str = "SH0742";

/// What a session is made of.
pub(crate) struct Session {
    pub(crate) client: WorkerServiceClient<Channel>,
    pub(crate) address: String,
    /// As it is said first; the attachment is filled in.
    pub(crate) hello: Hello,
    pub(crate) control: Arc<Control>,
    pub(crate) commands: Sender<Command>,
    pub(crate) reports: UnboundedReceiver<Message>,
    pub(crate) logs: Receiver<LogLine>,
    /// Cancelled when the process is asked to end once what it holds is in other hands.
    pub(crate) drain: CancellationToken,
}

/// How a connection ended.
enum End {
    /// It broke, or could not be made.
    Lost(String),
    /// The process is to end.
    Shutdown,
}

/// What is known across connections.
struct Memory {
    outbox: Outbox,
    /// The job and attempt that the coordinator assigned over this connection or an attached one before.
    assigned: Option<(String, u32)>,
    /// The last `Left` or `Broken`, as long as the worker belongs to that generation: said again to a coordinator that
    /// restarted meanwhile, which took the generation for alive.
    parted: Option<Message>,
    credit: Duration,
    /// Whether this connection's coordinator was told that the worker is to end.
    draining: bool,
    /// It was told that it may.
    drained: bool,
}

impl Session {
    /// Keeps a session up until `shutdown`.
    ///
    /// # Errors
    /// [`Error::Refused`] if the coordinator does not want this worker.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        let mut memory = Memory {
            outbox: Outbox::default(),
            assigned: None,
            parted: None,
            credit: Duration::from_secs(1),
            draining: false,
            drained: false,
        };
        let mut pause = FIRST_PAUSE;
        let mut told = String::new();
        loop {
            let began = Instant::now();
            match self.connect(&mut memory, &shutdown).await? {
                End::Shutdown => return Ok(()),
                End::Lost(reason) => {
                    if reason != told {
                        warn!(coordinator = %self.address, %reason, "no connection to the coordinator");
                        told = reason;
                    }
                }
            }
            if began.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One connection, from `Hello` to its end.
    async fn connect(&mut self, memory: &mut Memory, shutdown: &CancellationToken) -> Result<End, Error> {
        let attachment = self.control.attachment();
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut wire = Wire { sender };
        let draining = self.drain.is_cancelled();
        wire.send(Message::Hello(Hello {
            attachment: attachment.clone(),
            draining,
            shard_part: self.control.part(),
            ..self.hello.clone()
        }));
        memory.draining = draining;

        let opening = self.open(UnboundedReceiverStream::new(receiver));
        let opened = tokio::select! {
            opened = timeout(WELCOME_WITHIN, opening) => opened,
            () = shutdown.cancelled() => return Ok(End::Shutdown),
        };
        let (welcome, inbound) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(status)) => return self.lost(&status),
            Err(_) => return Ok(End::Lost("it did not say welcome in time".to_owned())),
        };
        info!(coordinator = %self.address, attached = welcome.attached, "connected to the coordinator");
        memory.credit = Duration::from_millis(welcome.credit_ms.into());
        self.settle(memory, &mut wire, attachment, welcome.attached);
        let beats = Duration::from_millis(u64::from(welcome.beat_interval_ms.max(1)));
        self.serve(memory, wire, inbound, beats, shutdown).await
    }

    async fn open(
        &self,
        outbound: UnboundedReceiverStream<WorkerMessage>,
    ) -> Result<(Welcome, Streaming<CoordinatorMessage>), Status> {
        let mut inbound = self.client.clone().session(outbound).await?.into_inner();
        match inbound.message().await?.and_then(|first| first.message) {
            Some(FromCoordinator::Welcome(welcome)) => Ok((welcome, inbound)),
            Some(_) => Err(Status::failed_precondition("its first message was no welcome")),
            None => Err(Status::unavailable("it closed the stream")),
        }
    }

    /// After `Welcome`: either goes on as the member that it was, or forgets what was said as that member.
    fn settle(&self, memory: &mut Memory, wire: &mut Wire, claimed: Option<Attachment>, attached: bool) {
        let unacknowledged = memory.outbox.reconnect();
        if attached && claimed.is_some() {
            let parting = |message: &Message| matches!(message, Message::Left(_) | Message::Broken(_));
            let others = unacknowledged.into_iter().filter(|message| !parting(message));
            for message in others.chain(memory.parted.clone()) {
                memory.outbox.sent(message.clone());
                wire.send(message);
            }
            return;
        }
        memory.assigned = None;
        memory.parted = None;
        if claimed.is_some() {
            warn!("the coordinator went on without this worker");
            self.control.drop_membership("the coordinator went on without this worker");
            self.command(Command::Dropped);
        }
    }

    async fn serve(
        &mut self,
        memory: &mut Memory,
        mut wire: Wire,
        mut inbound: Streaming<CoordinatorMessage>,
        beats: Duration,
        shutdown: &CancellationToken,
    ) -> Result<End, Error> {
        let mut tick: Interval = interval(beats);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let control = Arc::clone(&self.control);
        loop {
            // In this order: a beat that is due waits for nothing, and a simulation can be played again.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    wire.send(Message::Goodbye(Goodbye { reason: "the worker was asked to end".to_owned() }));
                    return Ok(say_no_more(wire, inbound).await);
                }
                _ = tick.tick() => {
                    if let Some(silent) = control.hung_for() {
                        return Err(Error::Hung { seconds: silent.as_secs_f64() });
                    }
                    self.beat(memory, &mut wire);
                }
                () = control.beat_wanted.notified() => self.beat(memory, &mut wire),
                message = inbound.message() => match message {
                    Ok(Some(CoordinatorMessage { message: Some(message) })) => {
                        self.receive(memory, &mut wire, message);
                    }
                    Ok(Some(CoordinatorMessage { message: None })) => debug!("the coordinator sent an unknown message"),
                    Ok(None) => return Ok(End::Lost("it closed the stream".to_owned())),
                    Err(status) => return self.lost(&status),
                },
                Some(report) = self.reports.recv() => self.report(memory, &mut wire, report),
                Some(line) = self.logs.recv() => self.forward_logs(memory, &mut wire, line),
                () = self.drain.cancelled(), if !memory.draining => {
                    memory.draining = true;
                    info!("asked to end: hands back what it holds");
                    wire.send(Message::Draining(Draining { reason: "the worker was asked to end".to_owned() }));
                }
            }
            if memory.drained {
                wire.send(Message::Goodbye(Goodbye { reason: "drained".to_owned() }));
                return Ok(say_no_more(wire, inbound).await);
            }
            if wire.sender.is_closed() {
                return Ok(End::Lost("the stream broke".to_owned()));
            }
        }
    }

    /// A status that ended the stream: fatal if a repeat cannot help.
    fn lost(&self, status: &Status) -> Result<End, Error> {
        let error = shanty_proto::from_status(status);
        // The token may have been exchanged for another; whoever has none is told so at the next attempt.
        if error.code == RIGHTS_ENDED {
            return Ok(End::Lost(error.message));
        }
        if matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied) {
            return Err(Error::part(&error));
        }
        let refused =
            matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented);
        if refused && !error.kind.is_retryable() {
            return Err(Error::Refused { address: self.address.clone(), reason: error.message });
        }
        Ok(End::Lost(error.message))
    }

    fn receive(&self, memory: &mut Memory, wire: &mut Wire, message: FromCoordinator) {
        match message {
            FromCoordinator::Welcome(_) => debug!("a second welcome"),
            FromCoordinator::BeatAck(ack) => {
                let sent = memory.outbox.acknowledged(ack.sequence);
                if let (Some(sent), Some(credit)) = (sent, ack.credit) {
                    if credit.deadline_ms > 0 {
                        self.control.set_deadline(Duration::from_millis(credit.deadline_ms.into()));
                    }
                    self.control.grant(credit.generation, credit.up_to_step, sent, memory.credit);
                }
            }
            FromCoordinator::Assign(assign) => {
                memory.assigned = Some((assign.job_id.clone(), assign.attempt));
                self.command(Command::Assign(assign));
            }
            FromCoordinator::Form(form) => {
                memory.parted = None;
                memory.assigned = Some((form.job_id.clone(), form.attempt));
                self.control.enter(Attachment {
                    job_id: form.job_id.clone(),
                    attempt: form.attempt,
                    generation: form.generation,
                    rank: form.rank,
                    applied_step: 0,
                });
                self.command(Command::Form(form));
                // The first credit is the answer to this beat.
                self.beat(memory, wire);
            }
            FromCoordinator::Leave(leave) => {
                info!(generation = leave.generation, after = leave.after_step, reason = %leave.reason, "leaving the generation");
                match leave.after_step {
                    Some(step) => self.control.leave_after(leave.generation, step, &leave.reason),
                    None => self.control.interrupt(leave.generation, &leave.reason),
                }
                self.command(Command::Leave(leave));
            }
            FromCoordinator::Release(release) => {
                info!(job = %release.job_id, succeeded = release.succeeded, reason = %release.reason, "released");
                memory.parted = None;
                memory.assigned = None;
                self.control.drop_membership(&release.reason);
                self.command(Command::Release(release));
            }
            FromCoordinator::Keep(keep) => self.command(Command::Keep(keep)),
            FromCoordinator::Drain(drain) => {
                info!(reason = %drain.reason, "the coordinator asks this worker to end");
                self.drain.cancel();
            }
            FromCoordinator::Drained(drained) => {
                info!(reason = %drained.reason, "drained");
                memory.drained = true;
            }
        }
    }

    /// A closed channel means that the trainer has ended, which ends the session elsewhere.
    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    fn report(&self, memory: &mut Memory, wire: &mut Wire, report: Message) {
        let about_assignment = match &report {
            Message::BaseReady(ready) => Some((&ready.job_id, ready.attempt)),
            Message::Failure(failure) => Some((&failure.job_id, failure.attempt)),
            _ => None,
        };
        if let Some((job_id, attempt)) = about_assignment
            && memory.assigned.as_ref().is_none_or(|(job, number)| job != job_id || *number != attempt)
        {
            debug!("an answer to an assignment of an earlier connection is not sent");
            return;
        }
        if matches!(report, Message::Left(_) | Message::Broken(_)) {
            memory.parted = Some(report.clone());
        }
        memory.outbox.sent(report.clone());
        let short_of_credit = match &report {
            Message::Step(step) => self.control.credited_step(step.generation) < step.step + LOW_CREDIT_STEPS,
            _ => false,
        };
        wire.send(report);
        if short_of_credit {
            self.beat(memory, wire);
        }
    }

    fn beat(&self, memory: &mut Memory, wire: &mut Wire) {
        if let Some(sequence) = memory.outbox.beat(Instant::now()) {
            let ((phase, progress), attachment) = (self.control.phase(), self.control.attachment());
            wire.send(Message::Beat(Beat { sequence, phase: phase.into(), attachment, progress }));
        }
    }

    fn forward_logs(&mut self, memory: &Memory, wire: &mut Wire, first: LogLine) {
        let mut lines = vec![first];
        while let Ok(line) = self.logs.try_recv() {
            lines.push(line);
        }
        if let Some((job_id, _)) = &memory.assigned {
            wire.send(Message::Logs(LogLines { job_id: job_id.clone(), lines }));
        }
    }
}

/// The stream ends once the coordinator has read the goodbye; not for long if it is stuck.
async fn say_no_more(wire: Wire, mut inbound: Streaming<CoordinatorMessage>) -> End {
    drop(wire);
    let _ =
        timeout(Duration::from_secs(1), async { while let Ok(Some(_)) = inbound.message().await {} }).await;
    End::Shutdown
}

/// The sending half of a connection. A send after the connection broke goes nowhere; the loop notices.
struct Wire {
    sender: UnboundedSender<WorkerMessage>,
}

impl Wire {
    fn send(&mut self, message: Message) {
        let _ = self.sender.send(WorkerMessage { message: Some(message) });
    }
}
