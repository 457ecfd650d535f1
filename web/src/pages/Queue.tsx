// Whose turn it is: jobs at work with the workers that are theirs, then those that wait, in their order.

import { useEffect } from "preact/hooks";

import { JobState } from "../gen/shanty/v1/common_pb";
import type { JobSummary } from "../gen/shanty/v1/job_pb";
import { Freshness, JobBadge } from "../parts/State";
import { Table, type Column } from "../parts/Table";
import { jobPath } from "../router";
import { isFinal } from "../state/job";
import { connection, keepFresh, list } from "../state/jobs";
import { ago, count, NONE } from "../text/format";

/** More than any cluster has: a job that is alone may have every worker. */
const ALL_WORKERS = 0xffff_ffff;

const shared: Column<JobSummary>[] = [
  { name: "Job", cell: ({ jobId }) => <a href={jobPath(jobId)}>{jobId}</a> },
  { name: "State", cell: ({ state }) => <JobBadge state={state} /> },
  { name: "Owner", cell: ({ owner }) => owner || NONE },
  { name: "Priority", number: true, cell: ({ priority }) => priority },
  { name: "Submitted", cell: ({ submittedUnixMs }) => ago(submittedUnixMs) },
  { name: "Why", wide: true, cell: ({ reason }) => reason },
];

const waiting: Column<JobSummary>[] = [{ name: "Place", number: true, cell: ({ place }) => place ?? NONE }, ...shared];

const atWork: Column<JobSummary>[] = [
  ...shared.slice(0, 4),
  { name: "Workers", number: true, cell: ({ members }) => count(members) },
  { name: "Share", number: true, cell: ({ share }) => (share === ALL_WORKERS ? "all" : count(share)) },
  ...shared.slice(4),
];

export function Queue() {
  useEffect(keepFresh, []);
  useEffect(() => void (document.title = "Queue · Shanty"), []);
  const jobs = (list.value ?? []).filter(({ state }) => !isFinal(state));
  const waits = ({ state, place }: JobSummary): boolean => place !== undefined || state === JobState.QUEUED;
  const queue = jobs.filter(waits).toSorted((one, other) => (one.place ?? Infinity) - (other.place ?? Infinity));
  return (
    <>
      <Freshness connection={connection.value} />
      <h1>Queue</h1>
      {list.value ? (
        <>
          <section aria-labelledby="at-work">
            <h2 id="at-work">At work</h2>
            <Table caption="Jobs at work" columns={atWork} rows={jobs.filter((job) => !waits(job))} rowKey={({ jobId }) => jobId} empty="No job is at work." />
          </section>
          <section aria-labelledby="waiting">
            <h2 id="waiting">Waiting</h2>
            <Table caption="Jobs that wait" columns={waiting} rows={queue} rowKey={({ jobId }) => jobId} empty="No job waits." />
          </section>
        </>
      ) : null}
    </>
  );
}
