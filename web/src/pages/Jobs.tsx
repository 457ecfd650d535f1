// All jobs, the newest first.

import { useEffect, useState } from "preact/hooks";

import { JobState } from "../gen/shanty/v1/common_pb";
import type { JobSummary } from "../gen/shanty/v1/job_pb";
import { Freshness, JobBadge } from "../parts/State";
import { Table, type Column } from "../parts/Table";
import { comparePath, go, jobPath } from "../router";
import { connection, keepFresh, list } from "../state/jobs";
import { ago, count, figure, NONE, percent } from "../text/format";

export function Jobs() {
  useEffect(keepFresh, []);
  useEffect(() => void (document.title = "Jobs · Shanty"), []);
  const [chosen, setChosen] = useState<ReadonlySet<string>>(new Set());
  const jobs = list.value;

  function choose(job: string): void {
    const next = new Set(chosen);
    if (!next.delete(job)) next.add(job);
    setChosen(next);
  }

  const columns: Column<JobSummary>[] = [
    { name: "Compare", cell: ({ jobId }) => <input type="checkbox" aria-label={`Compare ${jobId}`} checked={chosen.has(jobId)} onChange={() => choose(jobId)} /> },
    { name: "Job", cell: ({ jobId }) => <a href={jobPath(jobId)}>{jobId}</a> },
    { name: "State", cell: ({ state }) => <JobBadge state={state} /> },
    { name: "Step", number: true, cell: (job) => <Steps job={job} /> },
    { name: "Loss", number: true, cell: ({ loss }) => figure(loss) },
    { name: "Workers", number: true, cell: ({ members }) => members },
    { name: "Submitted", cell: ({ submittedUnixMs }) => ago(submittedUnixMs) },
    { name: "Owner", cell: ({ owner }) => owner || NONE },
    { name: "Why", wide: true, cell: ({ reason }) => reason },
  ];

  return (
    <>
      <Freshness connection={connection.value} />
      <div class="row">
        <h1>Jobs</h1>
        {jobs ? <span class="muted">{tally(jobs)}</span> : null}
        <button type="button" disabled={chosen.size < 2} onClick={() => go(comparePath([...chosen]))}>
          Compare {chosen.size > 1 ? chosen.size : ""}
        </button>
      </div>
      {jobs ? <section class="list" aria-label="All jobs"><Table caption="Jobs" columns={columns} rows={jobs} rowKey={({ jobId }) => jobId} empty="No job yet: shanty submit job.toml" /></section> : null}
    </>
  );
}

function Steps({ job: { step, steps } }: { job: JobSummary }) {
  if (steps === 0n) return <>–</>;
  const share = Number(step) / Number(steps);
  return (
    <span title={percent(share)}>
      {count(step)} <span class="muted">of {count(steps)}</span>
      <progress value={share} max={1} aria-label={percent(share)} />
    </span>
  );
}

function tally(jobs: readonly JobSummary[]): string {
  const running = jobs.filter(({ state }) => state === JobState.RUNNING || state === JobState.RECOVERING || state === JobState.FORMING).length;
  const waiting = jobs.filter(({ state }) => state === JobState.QUEUED || state === JobState.PREPARING).length;
  return `${running} at work, ${waiting} waiting, ${jobs.length} in all`;
}
