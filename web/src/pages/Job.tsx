// One job: what it does and why, its curves, its crew, what happened, its data, its checkpoints, its logs.

import { useEffect, useState } from "preact/hooks";

import { Actions } from "../parts/Actions";
import { Charts } from "../parts/Charts";
import { Checkpoints } from "../parts/Checkpoints";
import { Events, Recoveries } from "../parts/Events";
import { Fact, Facts } from "../parts/Facts";
import { LedgerFacts } from "../parts/Ledger";
import { Logs } from "../parts/Logs";
import { Members, PartsLegend } from "../parts/Members";
import { Freshness, JobBadge, jobWord } from "../parts/State";
import type { JobStatus } from "../gen/shanty/v1/status_pb";
import { isFinal, JobModel } from "../state/job";
import { count, duration, figure, NONE, percent } from "../text/format";

export function Job({ id }: { id: string }) {
  const [job, setJob] = useState<JobModel | null>(null);
  useEffect(() => {
    const model = new JobModel(id);
    setJob(model);
    return () => model.stop();
  }, [id]);
  if (!job) return null;
  return <Page job={job} />;
}

function Page({ job }: { job: JobModel }) {
  const status = job.status.value;
  const title = status ? `${share(status)} ${jobWord(status.state)} · ${job.id}` : job.id;
  useEffect(() => void (document.title = `${title} · Shanty`), [title]);
  return (
    <>
      <Freshness connection={job.connection.value} />
      <div class="row">
        <h1>{job.id}</h1>
        {status ? <JobBadge state={status.state} /> : null}
        {status ? <Actions status={status} /> : null}
      </div>
      {status ? <Found job={job} status={status} /> : null}
    </>
  );
}

function Found({ job, status }: { job: JobModel; status: JobStatus }) {
  const events = job.events.value;
  return (
    <>
      <p class="reason">{status.reason}</p>
      {status.error ? (
        <p class="banner bad" role="alert">
          <strong>{status.error.code}</strong> {status.error.message}
          {status.error.hint ? <span class="muted"> Hint: {status.error.hint}</span> : null}
        </p>
      ) : null}
      <Progress status={status} />
      <Charts job={job} />
      <section aria-labelledby="members">
        <div class="row">
          <h2 id="members">Members</h2>
          <span class="muted">generation {count(status.generation)}</span>
          <PartsLegend />
        </div>
        <Members members={status.members} />
      </section>
      <section aria-labelledby="recoveries">
        <h2 id="recoveries">Recoveries</h2>
        <Recoveries events={events} />
      </section>
      {status.ledger ? (
        <section aria-labelledby="ledger">
          <h2 id="ledger">Rows</h2>
          <LedgerFacts ledger={status.ledger} />
        </section>
      ) : null}
      <section aria-labelledby="checkpoints">
        <h2 id="checkpoints">Checkpoints</h2>
        <Checkpoints checkpoints={status.checkpoints} />
      </section>
      <section aria-labelledby="events">
        <h2 id="events">Events</h2>
        <Events events={events} />
      </section>
      <section aria-labelledby="logs">
        <h2 id="logs">Logs</h2>
        <Logs job={job.id} members={status.members} ended={isFinal(status.state)} />
      </section>
    </>
  );
}

const share = ({ step, steps }: JobStatus): string => (steps === 0n ? "" : percent(Number(step) / Number(steps)));

function Progress({ status }: { status: JobStatus }) {
  const done = status.steps === 0n ? 0 : Number(status.step) / Number(status.steps);
  const evaluated = status.evaluations[status.evaluations.length - 1];
  return (
    <>
      <progress class="wide" value={done} max={1} aria-label={`${percent(done)} of the steps`} />
      <Facts>
        <Fact name="Step">
          <span data-testid="step">{count(status.step)}</span> <span class="muted">of {count(status.steps)}</span>
        </Fact>
        <Fact name="Done">{share(status) || NONE}</Fact>
        <Fact name="Epoch">{figure(status.epoch, 3)}</Fact>
        <Fact name="Left">{isFinal(status.state) ? NONE : duration(status.etaSeconds)}</Fact>
        <Fact name="Loss" title="Mean of the last step, nats a token">
          {figure(status.loss)}
        </Fact>
        <Fact name="Eval loss" title={evaluated ? `after step ${evaluated.step}` : undefined}>
          {figure(evaluated?.loss)}
        </Fact>
        <Fact name="Tokens/s">{status.tokensPerSecond > 0 ? count(status.tokensPerSecond) : NONE}</Fact>
        <Fact name="Learning rate">{figure(status.learningRate, 3)}</Fact>
        <Fact name="Gradient norm">{figure(status.gradientNorm, 3)}</Fact>
        <Fact name="Attempt">{status.attempt}</Fact>
      </Facts>
    </>
  );
}
