// A chart over steps. The pointer reads values and drags to zoom; keys do the same; a double click or 0 shows all again.

import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

import type { Range } from "../state/job";
import { figure } from "../text/format";
import { colour, colours } from "../theme";
import { smooth, thin } from "./series";

/** A curve: its own steps, since an evaluation has fewer than training. */
export interface Line {
  label: string;
  /** Name of a colour of the style sheet. */
  colour: string;
  steps: readonly number[];
  values: readonly number[];
  /** Drawn as points joined by a thin line: there are few. */
  sparse?: boolean;
  /** Weight of the past in the drawn average; the values themselves are drawn faintly behind it. */
  smoothing?: number;
}

interface Props {
  title: string;
  unit?: string;
  lines: readonly Line[];
  /** Changes when the lines have grown in place. */
  version: number;
  /** What is shown: all for null. Charts that share it zoom together. */
  range: Range | null;
  onRange: (range: Range | null) => void;
  /** Charts with the same name move their cursor together. */
  sync?: string;
  logarithmic?: boolean;
}

const HEIGHT = 210;
/** A drag over fewer pixels is a click. */
const LEAST_DRAG = 8;

export function Chart(props: Props) {
  const { title, unit, lines, version, range, sync, logarithmic } = props;
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  // What the chart's own handlers see: the newest, though the chart was made long ago.
  const now = useRef(props);
  now.current = props;
  const [width, setWidth] = useState(0);
  const [said, setSaid] = useState("");
  const shape = JSON.stringify([lines.map(({ label, colour, sparse, smoothing }) => [label, colour, sparse, !!smoothing]), sync, logarithmic, colours.value]);

  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const watch = new ResizeObserver(() => setWidth(Math.floor(element.clientWidth)));
    watch.observe(element);
    setWidth(Math.floor(element.clientWidth));
    return () => watch.disconnect();
  }, []);

  useEffect(() => {
    const element = place.current;
    if (!element || width === 0) return;
    const made = new uPlot(options(lines, width, sync, logarithmic === true, (chosen) => now.current.onRange(chosen)), [[]], element);
    plot.current = made;
    draw(made, lines, range);
    return () => {
      made.destroy();
      plot.current = null;
    };
  }, [shape, width > 0]);

  useEffect(() => {
    if (plot.current && width > 0 && plot.current.width !== width) plot.current.setSize({ width, height: HEIGHT });
  }, [width]);

  useEffect(() => {
    if (plot.current) draw(plot.current, lines, range);
  }, [version, range, ...lines.map((line) => line.smoothing ?? 0)]);

  return (
    <figure class="chart">
      <figcaption>
        {title}
        {unit ? <span class="muted"> {unit}</span> : null}
      </figcaption>
      <div
        ref={place}
        class="plot"
        role="img"
        tabIndex={0}
        aria-label={summary(title, unit, lines)}
        onKeyDown={(event) => {
          const drawn = plot.current;
          if (drawn && followKey(drawn, event.key, range, props.onRange, (text) => setSaid(`${title}, ${text}`))) event.preventDefault();
        }}
      />
      <span class="unseen" aria-live="polite">
        {said}
      </span>
    </figure>
  );
}

/** What a screen reader says of a chart. */
function summary(title: string, unit: string | undefined, lines: readonly Line[]): string {
  const parts = lines.map(({ label, values }) => {
    const last = values[values.length - 1];
    return last === undefined ? `${label}: no values yet` : `${label}: ${values.length} values, first ${figure(values[0])}, last ${figure(last)}`;
  });
  return `${title}${unit ? ` in ${unit}` : ""}. ${parts.join(". ")}. Arrow keys read values, plus and minus zoom, 0 shows all.`;
}

function draw(plot: uPlot, lines: readonly Line[], range: Range | null): void {
  const table = data(lines, plot.width, range);
  const steps = table[0];
  const [first, last] = [steps[0] ?? 0, steps[steps.length - 1] ?? 1];
  const [min, max] = range ?? [first, last];
  plot.batch(() => {
    plot.setData(table, false);
    // Whoever has zoomed in keeps the view; everybody else follows the newest step.
    plot.setScale("x", { min, max: max > min ? max : min + 1 });
  });
}

/** Moves the cursor or the view; says whether the key meant something. */
function followKey(plot: uPlot, key: string, range: Range | null, onRange: (range: Range | null) => void, say: (text: string) => void): boolean {
  const steps = plot.data[0];
  const { min, max } = plot.scales.x ?? {};
  if (steps.length === 0 || min == null || max == null) return false;
  const at = plot.cursor.idx;
  const go = (index: number): void => {
    const place = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[place] as number;
    const first = plot.data[1]?.[place];
    plot.setCursor({ left: plot.valToPos(step, "x"), top: first == null ? 0 : plot.valToPos(first, "y") });
    const values = plot.series.slice(1).map((series, column) => `${String(series.label)} ${figure(plot.data[column + 1]?.[place] ?? undefined)}`);
    say(`step ${step}: ${values.join(", ")}`);
  };
  const middle = at == null ? (min + max) / 2 : (steps[at] as number);
  const zoom = (factor: number): void => {
    const half = ((max - min) * factor) / 2;
    const [first, last] = [steps[0] as number, steps[steps.length - 1] as number];
    const next: Range = [Math.max(first, middle - half), Math.min(last, middle + half)];
    onRange(factor > 1 && (range === null || next[1] - next[0] >= last - first) ? null : next[1] - next[0] >= 2 ? next : range);
  };
  switch (key) {
    case "ArrowRight":
      go(at == null ? 0 : at + 1);
      return true;
    case "ArrowLeft":
      go(at == null ? steps.length - 1 : at - 1);
      return true;
    case "Home":
      go(0);
      return true;
    case "End":
      go(steps.length - 1);
      return true;
    case "+":
    case "=":
      zoom(0.5);
      return true;
    case "-":
      zoom(2);
      return true;
    case "0":
    case "Escape":
      onRange(null);
      return true;
    default:
      return false;
  }
}

/** All lines over one axis. A smoothed line is two: the average, and the values behind it. */
function data(lines: readonly Line[], width: number, range: Range | null): uPlot.AlignedData {
  const tables = lines.flatMap((line): uPlot.AlignedData[] => {
    const columns = line.smoothing ? [line.values, smooth(line.values, line.smoothing)] : [line.values];
    const [from, to] = range ? bounds(line.steps, range) : [0, line.steps.length];
    const cut = range ? columns.map((column) => column.slice(from, to)) : columns;
    const [steps, thinned] = thin(range ? line.steps.slice(from, to) : line.steps, cut, Math.max(200, width * 2));
    return thinned.map((column): uPlot.AlignedData => [steps, column]);
  });
  return tables.length === 1 ? (tables[0] as uPlot.AlignedData) : uPlot.join(tables);
}

/** Places of the points of a range, and of one beyond each end, so that the line leaves the picture. */
function bounds(steps: readonly number[], [min, max]: Range): [number, number] {
  const from = steps.findIndex((step) => step >= min);
  const to = steps.findLastIndex((step) => step <= max);
  return from < 0 || to < 0 ? [0, steps.length] : [Math.max(0, from - 1), Math.min(steps.length, to + 2)];
}

/** A number at an axis: as short as it goes. */
function mark(tick: number): string {
  const size = Math.abs(tick);
  if (tick !== 0 && (size >= 1e6 || size < 1e-4)) return tick.toExponential().replace("e+", "e").replace("-", "−");
  return String(Number(tick.toPrecision(6))).replace("-", "−");
}

function options(lines: readonly Line[], width: number, sync: string | undefined, logarithmic: boolean, onRange: (range: Range | null) => void): uPlot.Options {
  const grid = { stroke: colour("line"), width: 1 };
  const axis = { stroke: colour("muted"), grid, ticks: { ...grid, size: 4 }, font: "11px system-ui, sans-serif" };
  const value = (_: uPlot, raw: number | null): string => figure(raw ?? undefined);
  const series = lines.flatMap((line): uPlot.Series[] => {
    const stroke = colour(line.colour);
    const base: uPlot.Series = { label: line.label, stroke, width: 1.75, value, spanGaps: true, points: { show: line.sparse === true, size: 5, fill: stroke } };
    return line.smoothing ? [{ ...base, stroke: `${stroke}55`, width: 1 }, { ...base, label: `${line.label}, average` }] : [base];
  });
  return {
    width,
    height: HEIGHT,
    cursor: {
      focus: { prox: 24 },
      // The page sets the scale: what is zoomed into may be fetched in more detail, and all charts follow.
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => (onRange(null), null) },
      ...(sync ? { sync: { key: sync } } : {}),
    },
    hooks: {
      setSelect: [
        (plot) => {
          const { left, width: drawn } = plot.select;
          if (drawn < LEAST_DRAG) return;
          onRange([plot.posToVal(left, "x"), plot.posToVal(left + drawn, "x")]);
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
    },
    legend: { live: true },
    scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : {} },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? `${tick}` : "")) },
      { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : mark(tick))) },
    ],
    series: [{ label: "step", value: (_, raw) => (raw === null ? "–" : `${Math.round(raw)}`) }, ...series],
  };
}
