//! The trace of a step across coordinator and workers, as a real receiver of OTLP gets it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value as Any},
    trace::v1::Span,
};
use shanty_testkit::{LocalCluster, TinyJob, process::PATIENCE, wait};
use tonic::{Request, Response, Status};

use crate::support::Place;

/// Spans by the service that sent them.
type Spans = Arc<Mutex<Vec<(String, Span)>>>;

/// A receiver of OTLP over gRPC: it decodes what collectors decode, and keeps it.
#[derive(Clone, Default)]
struct Receiver(Spans);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let service = text(&attributes, "service.name");
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Any> {
    attributes.iter().find(|one| one.key == key)?.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match attribute(attributes, key) {
        Some(Any::StringValue(text)) => text.clone(),
        _ => String::new(),
    }
}

fn number(span: &Span, key: &str) -> i64 {
    match attribute(&span.attributes, key) {
        Some(Any::IntValue(number)) => *number,
        other => panic!("{key} of {} is {other:?}", span.name),
    }
}

const STEPS: u64 = 10;

#[test]
fn a_step_is_one_trace_across_coordinator_and_workers() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let receiver = Receiver::default();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(receiver.clone());
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));

    let job =
        TinyJob { steps: STEPS, every_steps: 5, eval_every_steps: 5, workers: (2, 2), ..TinyJob::default() };
    let place = Place::new(job)
        .unwrap()
        .environment("SHANTY_COORDINATOR__TELEMETRY__OTLP", &endpoint)
        .environment("SHANTY_WORKER__TELEMETRY__OTLP", &endpoint);
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    for _ in 0..2 {
        cluster.add_worker().unwrap();
    }
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    cluster.wait_for_status(&job, "the end", |status| status["state"] == "succeeded").unwrap();

    let spans = wait::until("all spans", PATIENCE, || {
        let spans = receiver.0.lock().unwrap().clone();
        let count = |name: &str| spans.iter().filter(|(_, span)| span.name == name).count() as u64;
        let all = count("step") == STEPS
            && count("worker step") == 2 * STEPS
            && count("update") == 2 * STEPS
            && count("checkpoint") == 2;
        Ok(all.then_some(spans))
    })
    .unwrap_or_else(|error| {
        let mut counts = BTreeMap::<String, usize>::new();
        for (_, span) in receiver.0.lock().unwrap().iter() {
            *counts.entry(span.name.clone()).or_default() += 1;
        }
        panic!("{error}: {counts:?}")
    });
    let by_id: BTreeMap<Vec<u8>, &Span> =
        spans.iter().map(|(_, span)| (span.span_id.clone(), span)).collect();
    assert_eq!(by_id.len(), spans.len(), "each span has a number of its own");
    let mut traces = BTreeSet::new();
    for step in 1..=STEPS as i64 {
        let roots: Vec<_> = spans
            .iter()
            .filter(|(_, span)| span.name == "step" && number(span, "shanty.step") == step)
            .collect();
        let [(service, root)] = roots[..] else { panic!("{} traces of step {step}", roots.len()) };
        assert_eq!(service, "shanty-coordinator");
        assert!(root.parent_span_id.is_empty(), "it is the beginning of its trace");
        assert!(traces.insert(root.trace_id.clone()), "a trace of its own");
        assert_eq!(text(&root.attributes, "shanty.job"), job);
        let below = |parent: &Span| -> Vec<&(String, Span)> {
            spans.iter().filter(|(_, span)| span.parent_span_id == parent.span_id).collect()
        };
        let children = below(root);
        assert!(children.iter().all(|(_, span)| span.trace_id == root.trace_id));
        let leases =
            children.iter().filter(|(of, span)| of == "shanty-coordinator" && span.name == "lease").count();
        assert!(leases >= 2, "both workers leased rows of step {step}");
        let workers: Vec<&Span> = children
            .iter()
            .filter(|(of, span)| of == "shanty-worker" && span.name == "worker step")
            .map(|(_, span)| span)
            .collect();
        let names: BTreeSet<String> =
            workers.iter().map(|span| text(&span.attributes, "shanty.worker")).collect();
        assert_eq!((workers.len(), names.len()), (2, 2), "each worker made step {step} once");
        for worker in workers {
            let parts = below(worker);
            let names: BTreeSet<&str> = parts.iter().map(|(_, span)| span.name.as_str()).collect();
            for name in ["wait for rows", "compute", "reduce", "update"] {
                assert!(names.contains(name), "{name} of step {step}: {names:?}");
            }
            for (_, part) in
                parts.iter().filter(|(_, span)| !matches!(span.name.as_str(), "checkpoint" | "evaluate"))
            {
                let slack = 5_000_000;
                assert!(part.start_time_unix_nano + slack >= worker.start_time_unix_nano, "{}", part.name);
                assert!(part.end_time_unix_nano <= worker.end_time_unix_nano + slack, "{}", part.name);
            }
            assert!(worker.end_time_unix_nano > worker.start_time_unix_nano);
        }
    }
    let of_steps = |name: &str| -> BTreeSet<i64> {
        let mut steps = BTreeSet::new();
        for (_, span) in spans.iter().filter(|(_, span)| span.name == name) {
            steps.insert(number(by_id[&span.parent_span_id], "shanty.step"));
        }
        steps
    };
    assert_eq!(of_steps("checkpoint"), BTreeSet::from([5, 10]));
    assert_eq!(of_steps("evaluate"), BTreeSet::from([5, 10]));
}

#[test]
fn a_collector_that_is_away_costs_no_step_and_a_wrong_address_is_told() {
    let job = TinyJob { steps: 6, workers: (1, 1), ..TinyJob::default() };
    // Nobody listens there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{nobody}");
    let place = Place::new(job)
        .unwrap()
        .environment("SHANTY_COORDINATOR__TELEMETRY__OTLP", &endpoint)
        .environment("SHANTY_WORKER__TELEMETRY__OTLP", &endpoint);
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    cluster.add_worker().unwrap();
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let over = cluster.wait_for_status(&job, "the end", |status| status["state"] == "succeeded").unwrap();
    assert_eq!(over["step"], 6);

    let wrong = place.shanty.environment("SHANTY_COORDINATOR__TELEMETRY__OTLP", "collector:4317");
    let refused = wrong.run(&["coordinator", "--listen", "127.0.0.1:0", "--output", "json"]).unwrap();
    assert_eq!(refused.code(), Some(2), "{}", refused.stderr);
    let error = refused.error().unwrap();
    assert!(error.to_string().contains("telemetry.otlp"), "{error}");
}
