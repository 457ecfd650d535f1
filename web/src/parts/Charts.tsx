// A job's curves, with one cursor and one view over all of them.

import { useState } from "preact/hooks";

import { Chart, type Line } from "../chart/Chart";
import type { Curve, JobModel } from "../state/job";
import { count } from "../text/format";

const SMOOTHING = 0.9;

export function Charts({ job }: { job: JobModel }) {
  const [smoothed, setSmoothed] = useState(false);
  const [logarithmic, setLogarithmic] = useState(false);
  const [version, range, oneOf] = [job.drawn.value, job.range.value, job.oneOf.value];
  const { steps, columns } = job.shown();
  const line = (label: string, name: Curve, colour: string): Line => ({ label, colour, steps, values: columns[name] });
  const loss: Line[] = [{ ...line("train", "loss", "curve-1"), smoothing: smoothed ? SMOOTHING : 0 }];
  if (job.evaluation.length > 0) loss.push({ label: "eval", colour: "curve-2", steps: job.evaluation.steps, values: job.evaluation.columns.loss, sparse: true });
  const shared = { version, range, onRange: (chosen: typeof range) => job.zoom(chosen), sync: job.id };
  return (
    <section aria-labelledby="curves">
      <div class="row">
        <h2 id="curves">Curves</h2>
        <label>
          <input type="checkbox" checked={smoothed} onChange={() => setSmoothed(!smoothed)} /> average
        </label>
        <label>
          <input type="checkbox" checked={logarithmic} onChange={() => setLogarithmic(!logarithmic)} /> logarithmic loss
        </label>
        {range ? (
          <button type="button" onClick={() => job.zoom(null)}>
            Show all steps
          </button>
        ) : null}
        <span class="muted hint">
          {range ? `steps ${count(range[0])} to ${count(range[1])}` : oneOf > 1 ? `one of ${count(oneOf)} steps is drawn; ` : ""}
          {range ? "" : "drag to zoom, double click for all"}
        </span>
      </div>
      <div class="charts">
        <Chart title="Loss" unit="nats a token" lines={loss} logarithmic={logarithmic} {...shared} />
        <Chart title="Throughput" unit="tokens a second" lines={[line("tokens/s", "tokensPerSecond", "curve-3")]} {...shared} />
        <Chart title="Gradient norm" lines={[line("norm", "gradientNorm", "curve-4")]} {...shared} />
        <Chart title="Learning rate" lines={[line("rate", "learningRate", "curve-5")]} {...shared} />
      </div>
    </section>
  );
}
