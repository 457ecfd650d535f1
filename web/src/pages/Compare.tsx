// Several jobs' losses in one chart.

import { useEffect, useState } from "preact/hooks";

import { Chart, type Line } from "../chart/Chart";
import { Freshness, JobBadge } from "../parts/State";
import { Table, type Column } from "../parts/Table";
import type { Goodput } from "../gen/shanty/v1/status_pb";
import { jobPath } from "../router";
import { JobModel, type Range } from "../state/job";
import { count, figure, NONE, percent } from "../text/format";

const COLOURS = 6;

const share = (goodput: Goodput | null): string => (goodput && goodput.elapsedSeconds > 0 ? percent(Math.min(1, goodput.productiveSeconds / goodput.elapsedSeconds)) : NONE);

export function Compare({ ids }: { ids: readonly string[] }) {
  const [jobs, setJobs] = useState<readonly JobModel[]>([]);
  const names = ids.join("\n");
  useEffect(() => {
    const models = names === "" ? [] : [...new Set(names.split("\n"))].map((id) => new JobModel(id));
    setJobs(models);
    return () => models.forEach((model) => model.stop());
  }, [names]);
  useEffect(() => void (document.title = "Compare · Shanty"), []);

  const [range, setRange] = useState<Range | null>(null);
  const shared = { range, onRange: setRange, sync: "compare" };
  const version = jobs.reduce((sum, job) => sum + job.drawn.value, 0);
  const colourOf = (index: number): string => `curve-${(index % COLOURS) + 1}`;
  const training = jobs.map((job, index): Line => ({ label: job.id, colour: colourOf(index), steps: job.training.steps, values: job.training.columns.loss }));
  const evaluation = jobs
    .map((job, index): Line => ({ label: job.id, colour: colourOf(index), steps: job.evaluation.steps, values: job.evaluation.columns.loss, sparse: true }))
    .filter(({ steps }) => steps.length > 0);
  const pace = jobs.map((job, index): Line => ({ label: job.id, colour: colourOf(index), steps: job.training.steps, values: job.training.columns.tokensPerSecond }));

  const columns: Column<JobModel>[] = [
    { name: "Job", cell: ({ id }) => <a href={jobPath(id)}>{id}</a> },
    { name: "State", cell: ({ status }) => (status.value ? <JobBadge state={status.value.state} /> : "…") },
    { name: "Step", number: true, cell: ({ figures }) => count(figures.value?.step ?? 0n) },
    { name: "Loss", number: true, cell: ({ figures }) => figure(figures.value?.loss) },
    { name: "Best eval loss", number: true, cell: ({ evaluation: { columns } }) => figure(columns.loss.length > 0 ? Math.min(...columns.loss) : undefined) },
    { name: "Tokens/s", number: true, cell: ({ figures }) => (figures.value ? count(figures.value.tokensPerSecond) : "…") },
    { name: "Goodput", number: true, cell: ({ goodput }) => share(goodput.value) },
  ];

  return (
    <>
      <h1>Compare</h1>
      {jobs.map((job) => (
        <Freshness key={job.id} connection={job.connection.value} />
      ))}
      <section aria-label="Runs">
        <Table caption="Compared jobs" columns={columns} rows={jobs} rowKey={({ id }) => id} empty="Choose two jobs in the list of jobs." />
      </section>
      <section aria-label="Curves">
      <div class="charts">
        <Chart title="Training loss" unit="nats a token" lines={training} version={version} {...shared} />
        {evaluation.length > 0 ? <Chart title="Evaluation loss" unit="nats a token" lines={evaluation} version={version} {...shared} /> : null}
        <Chart title="Throughput" unit="tokens a second" lines={pace} version={version} {...shared} />
      </div>
      </section>
    </>
  );
}
