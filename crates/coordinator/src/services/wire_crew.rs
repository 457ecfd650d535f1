//! How a crew fares, as it travels.

use shanty_proto::v1;

use crate::machine::{CrewView, Straggler, record::RecoveryRecord};

pub(super) fn health_out(from: &CrewView) -> v1::CrewHealth {
    v1::CrewHealth {
        deadline_seconds: from.deadline_seconds,
        usual_step_seconds: from.usual_step_seconds,
        stragglers: from.stragglers.iter().map(straggler_out).collect(),
        spares: from.spares.iter().map(ToString::to_string).collect(),
        recoveries: from.recoveries.iter().map(recovery_out).collect(),
        losses: from.losses,
        coordinator_restarts: from.coordinator_restarts,
    }
}

fn straggler_out(from: &Straggler) -> v1::Straggler {
    v1::Straggler {
        worker_id: from.worker.to_string(),
        cause: from.cause.to_owned(),
        compute_seconds: from.compute[0],
        median_compute_seconds: from.compute[1],
        data_seconds: from.data[0],
        median_data_seconds: from.data[1],
        reduce_seconds: from.reduce[0],
        median_reduce_seconds: from.reduce[1],
        steps: from.steps,
    }
}

fn recovery_out(from: &RecoveryRecord) -> v1::Recovery {
    v1::Recovery {
        unix_ms: from.unix_ms,
        cause: from.cause.clone(),
        text: from.text.clone(),
        worker_id: from.worker.as_ref().map(ToString::to_string).unwrap_or_default(),
        step: from.step.0,
        generation: from.generation.0,
        detection_ms: from.detection_ms,
        stall_ms: from.stall_ms,
        steps_lost: from.steps_lost,
        rows_requeued: from.rows_requeued,
    }
}
