// What became of a job's time.

import type { Goodput } from "../gen/shanty/v1/status_pb";
import { duration, percent } from "../text/format";

export function GoodputBar({ goodput }: { goodput: Goodput }) {
  const { productiveSeconds, recomputedSeconds, stalledSeconds, elapsedSeconds } = goodput;
  const known = productiveSeconds + recomputedSeconds + stalledSeconds;
  // Clocks differ a little: a step's own clock may have counted more than the wall's.
  const all = Math.max(elapsedSeconds, known);
  if (all <= 0) return null;
  const parts = [
    ["productive", productiveSeconds],
    ["recomputed", recomputedSeconds],
    ["stalled", stalledSeconds],
    ["other", all - known],
  ] as const;
  const words = parts.map(([name, seconds]) => `${name} ${duration(seconds)}`).join(", ");
  return (
    <div class="goodput">
      <p class="legend">
        <span>
          Goodput <strong data-testid="goodput">{percent(productiveSeconds / all)}</strong> <span class="muted">of {duration(all)}</span>
        </span>
        {parts.map(([name, seconds]) => (
          <span class="muted" key={name} title={name === "other" ? "evaluations, waiting for a turn or for workers" : undefined}>
            <span class={`swatch ${name}`} /> {name} {duration(seconds)}
          </span>
        ))}
      </p>
      <span class="parts wide" role="img" aria-label={words}>
        {parts.map(([name, seconds]) => (
          <span key={name} class={`part ${name}`} style={{ width: `${(seconds / all) * 100}%` }} />
        ))}
      </span>
    </div>
  );
}
