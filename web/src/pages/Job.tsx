// One job: what it does and why, its curves, its crew, what happened, its data, its checkpoints, its logs, its configuration.

import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";

import type { JobStatus } from "../gen/shanty/v1/status_pb";
import { Actions } from "../parts/Actions";
import { Charts } from "../parts/Charts";
import { Checkpoints } from "../parts/Checkpoints";
import { Configuration } from "../parts/Configuration";
import { Events } from "../parts/Events";
import { Fact, Facts } from "../parts/Facts";
import { GoodputBar } from "../parts/Goodput";
import { LedgerFacts } from "../parts/Ledger";
import { Logs } from "../parts/Logs";
import { Members, PartsLegend } from "../parts/Members";
import { Recoveries } from "../parts/Recoveries";
import { Freshness, JobBadge, jobWord } from "../parts/State";
import { Stragglers } from "../parts/Stragglers";
import { isFinal, JobModel, type Figures } from "../state/job";
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
  return (
    <>
      <Title job={job} />
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

/** The tab says how far the job is. */
function Title({ job }: { job: JobModel }) {
  const [status, figures] = [job.status.value, job.figures.value];
  const title = status && figures ? `${share(figures)} ${jobWord(status.state)} · ${job.id}` : job.id;
  useEffect(() => void (document.title = `${title} · Shanty`), [title]);
  return null;
}

function Found({ job, status }: { job: JobModel; status: JobStatus }) {
  const ended = isFinal(status.state);
  return (
    <>
      <p class="reason" data-testid="reason">
        {status.reason}
      </p>
      {status.error ? (
        <p class="banner bad" role="alert">
          <strong>{status.error.code}</strong> {status.error.message}
          {status.error.hint ? <span class="muted"> Hint: {status.error.hint}</span> : null}
        </p>
      ) : null}
      {status.adapter ? (
        <p class="banner">
          The adapter: <code>{status.adapter}</code>
        </p>
      ) : null}
      <Progress job={job} ended={ended} attempt={status.attempt} />
      <Charts job={job} />
      <Crew job={job} status={status} ended={ended} />
      <Section id="recoveries" name="Recoveries">
        <RecoveriesOf job={job} status={status} />
      </Section>
      <Section id="ledger" name="Rows">
        <Rows job={job} />
      </Section>
      <Section id="checkpoints" name="Checkpoints">
        <CheckpointsOf job={job} />
      </Section>
      <Section id="stragglers" name="Stragglers">
        <StragglersOf job={job} />
      </Section>
      <Section id="events" name="Events">
        <EventsOf job={job} />
      </Section>
      <Section id="logs" name="Logs">
        <Logs job={job.id} members={status.members} ended={ended} />
      </Section>
      <Section id="configuration" name="Configuration">
        <Configuration job={job.id} known={`${status.steps > 0n} ${status.generation > 0n}`} />
      </Section>
    </>
  );
}

function Section({ id, name, beside, children }: { id: string; name: string; beside?: ComponentChildren; children: ComponentChildren }) {
  return (
    <section aria-labelledby={id}>
      <div class="row">
        <h2 id={id}>{name}</h2>
        {beside}
      </div>
      {children}
    </section>
  );
}

// Each of these looks at what it shows and at nothing else, so that it alone is drawn anew.

function Crew({ job, status, ended }: { job: JobModel; status: JobStatus; ended: boolean }) {
  const members = job.members.value;
  const crew = job.crew.value;
  const present = members.filter(({ rank, reason }) => rank !== undefined && reason === "").length;
  const beside = (
    <>
      <span class="muted" data-testid="present">
        {present} at work, generation {count(status.generation)}
        {crew && crew.losses > 0n ? `, ${count(crew.losses)} lost so far` : ""}
        {crew?.deadlineSeconds === undefined ? "" : `, hung after ${duration(crew.deadlineSeconds)} without progress`}
      </span>
      <PartsLegend />
    </>
  );
  return (
    <Section id="members" name="Members" beside={beside}>
      <Members members={members} ended={ended} />
    </Section>
  );
}

const RecoveriesOf = ({ job, status }: { job: JobModel; status: JobStatus }) => <Recoveries status={status} crew={job.crew.value} events={job.events.value} />;
const Rows = ({ job }: { job: JobModel }) => (job.ledger.value ? <LedgerFacts ledger={job.ledger.value} /> : null);
const CheckpointsOf = ({ job }: { job: JobModel }) => <Checkpoints job={job.id} checkpoints={job.checkpoints.value} />;
const StragglersOf = ({ job }: { job: JobModel }) => (job.crew.value ? <Stragglers crew={job.crew.value} /> : null);
const EventsOf = ({ job }: { job: JobModel }) => <Events events={job.events.value} />;

const share = ({ step, steps }: Figures): string => (steps === 0n ? "" : percent(Number(step) / Number(steps)));

function Progress({ job, ended, attempt }: { job: JobModel; ended: boolean; attempt: number }) {
  const figures = job.figures.value;
  void job.drawn.value;
  if (!figures) return null;
  const done = figures.steps === 0n ? 0 : Number(figures.step) / Number(figures.steps);
  const { steps: evaluated, columns } = job.evaluation;
  return (
    <>
      <progress class="wide" value={done} max={1} aria-label={`${percent(done)} of the steps`} />
      <Facts>
        <Fact name="Step">
          <span data-testid="step">{count(figures.step)}</span> <span class="muted">of {count(figures.steps)}</span>
        </Fact>
        <Fact name="Done">{share(figures) || NONE}</Fact>
        <Fact name="Epoch">{figure(figures.epoch, 3)}</Fact>
        <Fact name="Left">{ended ? NONE : duration(figures.etaSeconds)}</Fact>
        <Fact name="Loss" title="Mean of the last step, nats a token">
          {figure(figures.loss)}
        </Fact>
        <Fact name="Eval loss" title={evaluated.length > 0 ? `after step ${evaluated[evaluated.length - 1]}` : undefined}>
          {figure(columns.loss[columns.loss.length - 1])}
        </Fact>
        <Fact name="Tokens/s">{figures.tokensPerSecond > 0 ? count(figures.tokensPerSecond) : NONE}</Fact>
        <Fact name="Learning rate">{figure(figures.learningRate, 3)}</Fact>
        <Fact name="Gradient norm">{figure(figures.gradientNorm, 3)}</Fact>
        <Fact name="Attempt">{attempt}</Fact>
      </Facts>
      {job.goodput.value ? <GoodputBar goodput={job.goodput.value} /> : null}
    </>
  );
}
