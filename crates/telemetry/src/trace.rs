//! Traces: spans that go to a collector over OTLP, and their context as it travels (W3C's `traceparent`).
//!
//! A span is recorded when it is over, with its start and its end: what is measured anyway needs no second clock, and a step
//! that nobody traces costs nothing. Spans are sent by a thread of their own; a collector that is away costs spans, never steps.

use std::{
    cell::Cell,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context as Around, KeyValue,
    trace::{
        Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
        Tracer as _, TracerProvider,
    },
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider},
};

use crate::Error;

/// How long a collector may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

pub use opentelemetry::Value;

/// A property of a span.
pub type Attribute = (&'static str, Value);

thread_local! {
    /// The numbers of the next span of this thread, where they were drawn before.
    static DRAWN: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// Draws numbers of spans, unless they were drawn before: a span that is recorded at its end has told its children of
/// itself at its beginning.
#[derive(Debug)]
struct Numbers;

impl IdGenerator for Numbers {
    fn new_trace_id(&self) -> TraceId {
        DRAWN.get().map_or_else(|| RandomIdGenerator::default().new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        DRAWN.get().map_or_else(|| RandomIdGenerator::default().new_span_id(), |(_, span)| span)
    }
}

/// A place in a trace: what is caused by it names it as its parent.
#[derive(Debug, Clone, PartialEq)]
pub struct Context(SpanContext);

impl Context {
    /// The beginning of a new trace.
    pub fn new_trace() -> Self {
        let draw = RandomIdGenerator::default();
        Self::of(draw.new_trace_id(), draw.new_span_id())
    }

    fn of(trace: TraceId, span: SpanId) -> Self {
        Self(SpanContext::new(trace, span, TraceFlags::SAMPLED, true, TraceState::default()))
    }

    /// Reads a `traceparent`; nothing that is none, or of a trace that is not kept.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_well_formed = version.len() == 2 && version != "ff" && trace.len() == 32 && span.len() == 16;
        let is_kept = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        let context = Self::of(TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
        (is_well_formed && is_kept && context.0.is_valid()).then_some(context)
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-01", self.0.trace_id(), self.0.span_id())
    }
}

/// A span that is over.
#[derive(Debug)]
pub struct Span {
    /// What was done.
    pub name: &'static str,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// What is to be known of it.
    pub attributes: Vec<Attribute>,
    /// What went wrong, if something did.
    pub error: Option<String>,
}

/// Sends spans; or does nothing, where nobody wants any. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Tracer {
    /// Sends nothing.
    pub fn off() -> Self {
        Self::default()
    }

    /// Sends to the collector at `endpoint` (`http://host:4317`), as `service`; to be called on a runtime of several threads.
    ///
    /// # Errors
    /// [`Error::Trace`] for an endpoint that is none. One that does not answer is no error: it may come.
    pub fn to(endpoint: &str, service: &'static str, instance: &str) -> Result<Self, Error> {
        let failed = |reason: String| Error::Trace { endpoint: endpoint.to_owned(), reason };
        if !endpoint.starts_with("http://") {
            return Err(failed("it is no URL that begins with http://".to_owned()));
        }
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(ANSWER_WITHIN)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_id_generator(Numbers)
            .with_resource(resource)
            .with_batch_exporter(exporter)
            .build();
        let tracer = provider.tracer("shanty");
        Ok(Self(Some(Arc::new(Inner { provider, tracer }))))
    }

    /// Whether somebody wants spans.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Records a span that was caused by `parent`; gives its own place.
    pub fn record(&self, parent: &Context, span: Span) -> Option<Context> {
        let around = Around::new().with_remote_span_context(parent.0.clone());
        self.send(&around, span)
    }

    /// Records the span whose place was drawn ahead: the beginning of its trace.
    pub fn record_root(&self, place: &Context, span: Span) {
        DRAWN.set(Some((place.0.trace_id(), place.0.span_id())));
        self.send(&Around::new(), span);
        DRAWN.set(None);
    }

    fn send(&self, around: &Around, span: Span) -> Option<Context> {
        let inner = self.0.as_ref()?;
        let attributes = span.attributes.into_iter().map(|(name, value)| KeyValue::new(name, value));
        let mut open = inner
            .tracer
            .span_builder(span.name)
            .with_kind(SpanKind::Internal)
            .with_start_time(span.start)
            .with_attributes(attributes)
            .start_with_context(&inner.tracer, around);
        if let Some(error) = span.error {
            open.set_status(Status::error(error));
        }
        let context = open.span_context();
        let place = Context::of(context.trace_id(), context.span_id());
        open.end_with_timestamp(span.end);
        Some(place)
    }

    /// Sends what is not sent yet; blocks until the collector has it, or does not answer in time.
    pub fn flush(&self) {
        if let Some(inner) = &self.0
            && let Err(error) = inner.provider.force_flush()
        {
            tracing::warn!(%error, "spans could not be sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_survives_the_wire_and_nonsense_is_none() {
        let context = Context::new_trace();
        assert_eq!(Context::parse(&context.to_string()).as_ref(), Some(&context));
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(Context::parse(good).map(|context| context.to_string()).as_deref(), Some(good));
        let bad = [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-xyz92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf9-00f067aa0ba902b7-01",
        ];
        for text in bad {
            assert_eq!(Context::parse(text), None, "{text}");
        }
    }

    #[test]
    fn where_nobody_wants_spans_nothing_is_recorded() {
        let now = SystemTime::now();
        let span = Span { name: "step", start: now, end: now, attributes: Vec::new(), error: None };
        assert_eq!(Tracer::off().record(&Context::new_trace(), span), None);
        assert!(Tracer::to("collector:4317", "shanty", "x").is_err());
    }
}
