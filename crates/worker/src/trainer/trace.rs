//! A worker's part in the trace of a step.

use std::time::{Duration, SystemTime};

use shanty_proto::v1::StepTimings;
use shanty_telemetry::trace::{Context, Span, Tracer, Value};

use super::formation::Formation;

/// What spans of this worker say of it.
#[derive(Debug, Clone)]
pub(crate) struct Traces {
    pub(crate) tracer: Tracer,
    pub(crate) worker_id: String,
    pub(crate) device: String,
}

/// Where in a trace a worker is: its share of a step, for what follows from it.
#[derive(Debug, Clone)]
pub(crate) struct Trace {
    traces: Traces,
    place: Context,
}

impl Traces {
    /// Records a step that was made: as a whole, and what its time went into, one after the other.
    pub(crate) fn step(
        &self,
        parent: &Context,
        formation: &Formation,
        step: u64,
        seconds: f64,
        timings: &StepTimings,
    ) -> Option<Trace> {
        let end = SystemTime::now();
        let duration = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let start = end.checked_sub(duration(seconds))?;
        let attributes = vec![
            ("shanty.worker", Value::from(self.worker_id.clone())),
            ("shanty.device", Value::from(self.device.clone())),
            ("shanty.rank", i64::from(formation.rank).into()),
            ("shanty.generation", i64::try_from(formation.generation).unwrap_or(i64::MAX).into()),
            ("shanty.step", i64::try_from(step).unwrap_or(i64::MAX).into()),
            ("shanty.tokens", i64::try_from(timings.tokens).unwrap_or(i64::MAX).into()),
        ];
        let whole = Span { name: "worker step", start, end, attributes, error: None };
        let place = self.tracer.record(parent, whole)?;
        let parts = [
            ("wait for rows", timings.data_seconds),
            ("compute", timings.compute_seconds),
            ("reduce", timings.reduce_seconds),
            ("update", timings.update_seconds),
        ];
        let mut at = start;
        for (name, seconds) in parts {
            let end = at + duration(seconds);
            self.tracer.record(&place, Span { name, start: at, end, attributes: Vec::new(), error: None });
            at = end;
        }
        Some(Trace { traces: self.clone(), place })
    }
}

impl Trace {
    /// Records something that followed from the step and took from `start` until now.
    pub(crate) fn record(&self, name: &'static str, start: SystemTime, error: Option<String>) {
        let end = SystemTime::now();
        let attributes = vec![("shanty.worker", Value::from(self.traces.worker_id.clone()))];
        self.traces.tracer.record(&self.place, Span { name, start, end, attributes, error });
    }
}
