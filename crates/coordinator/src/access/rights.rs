//! The one table of rights: from a call to the least role that may make it. A call without a row is refused to everybody, and a
//! test asks for a row of each call that the descriptors know.

use shanty_access::Least;

/// Calls by their path, in order.
pub const RIGHTS: &[(&str, Least)] = &[
    ("/grpc.health.v1.Health/Check", Least::Read),
    ("/grpc.health.v1.Health/Watch", Least::Read),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Least::Read),
    ("/shanty.v1.AccessService/CreateToken", Least::Admin),
    ("/shanty.v1.AccessService/ListTokens", Least::Admin),
    ("/shanty.v1.AccessService/RevokeToken", Least::Admin),
    ("/shanty.v1.JobService/CancelJob", Least::Submit),
    ("/shanty.v1.JobService/DrainWorker", Least::Admin),
    ("/shanty.v1.JobService/ListCheckpoints", Least::Read),
    ("/shanty.v1.JobService/ListJobs", Least::Read),
    ("/shanty.v1.JobService/ResumeJob", Least::Submit),
    ("/shanty.v1.JobService/SubmitJob", Least::Submit),
    ("/shanty.v1.StatusService/GetStatus", Least::Read),
    ("/shanty.v1.StatusService/ListEvents", Least::Read),
    ("/shanty.v1.StatusService/ListSteps", Least::Read),
    ("/shanty.v1.StatusService/TailLogs", Least::Read),
    ("/shanty.v1.StatusService/WatchJob", Least::Read),
    ("/shanty.v1.WorkerService/LeaseRows", Least::Worker),
    ("/shanty.v1.WorkerService/Session", Least::Worker),
];

/// The least role that may make a call.
pub(crate) fn least(call: &str) -> Option<Least> {
    RIGHTS.binary_search_by_key(&call, |(path, _)| path).ok().map(|at| RIGHTS[at].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_and_found() {
        assert!(RIGHTS.is_sorted_by(|one, other| one.0 < other.0));
        for (call, expected) in RIGHTS {
            assert_eq!(least(call), Some(*expected));
        }
        assert_eq!(least("/shanty.v1.JobService/DeleteEverything"), None);
        assert_eq!(least(""), None);
    }
}
