// A chart over steps: hover reads values, dragging zooms, a double click shows all again.

import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

import { colour, colours } from "../theme";
import { figure } from "../text/format";
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
  /** Charts with the same name move their cursor together. */
  sync?: string;
  logarithmic?: boolean;
}

const HEIGHT = 210;

export function Chart({ title, unit, lines, version, sync, logarithmic }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const [width, setWidth] = useState(0);
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
    const made = new uPlot(options(lines, width, sync, logarithmic === true), data(lines, width), element);
    plot.current = made;
    return () => {
      made.destroy();
      plot.current = null;
    };
  }, [shape, width > 0]);

  useEffect(() => {
    if (plot.current && width > 0 && plot.current.width !== width) plot.current.setSize({ width, height: HEIGHT });
  }, [width]);

  useEffect(() => {
    const drawn = plot.current;
    if (!drawn) return;
    // Who has zoomed in keeps the view; everybody else follows the newest step.
    const zoomed = isZoomed(drawn);
    drawn.setData(data(lines, drawn.width), !zoomed);
    if (zoomed) drawn.redraw();
  }, [version, ...lines.map((line) => line.smoothing ?? 0)]);

  return (
    <figure class="chart" aria-label={summary(title, unit, lines)} role="img">
      <figcaption>
        {title}
        {unit ? <span class="muted"> {unit}</span> : null}
      </figcaption>
      <div ref={place} class="plot" />
    </figure>
  );
}

/** What a screen reader says of a chart. */
function summary(title: string, unit: string | undefined, lines: readonly Line[]): string {
  const parts = lines.map(({ label, values }) => {
    const last = values[values.length - 1];
    return last === undefined ? `${label}: no values yet` : `${label}: ${values.length} values, first ${figure(values[0])}, last ${figure(last)}`;
  });
  return `${title}${unit ? ` in ${unit}` : ""}. ${parts.join(". ")}`;
}

function isZoomed(plot: uPlot): boolean {
  const steps = plot.data[0];
  const { min, max } = plot.scales.x ?? {};
  if (min === undefined || max === undefined || min === null || max === null || steps.length < 2) return false;
  return min > (steps[0] as number) || max < (steps[steps.length - 1] as number);
}

/** All lines over one axis. A smoothed line is two: the average, and the values behind it. */
function data(lines: readonly Line[], width: number): uPlot.AlignedData {
  const tables = lines.flatMap((line): uPlot.AlignedData[] => {
    const columns = line.smoothing ? [line.values, smooth(line.values, line.smoothing)] : [line.values];
    const [steps, thinned] = thin(line.steps, columns, Math.max(200, width * 2));
    return thinned.map((column): uPlot.AlignedData => [steps, column]);
  });
  return tables.length === 1 ? (tables[0] as uPlot.AlignedData) : uPlot.join(tables);
}

function options(lines: readonly Line[], width: number, sync: string | undefined, logarithmic: boolean): uPlot.Options {
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
    ...(sync ? { cursor: { sync: { key: sync }, focus: { prox: 24 } } } : {}),
    legend: { live: true },
    scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : {} },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? `${tick}` : "")) },
      { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : figure(tick, 3))) },
    ],
    series: [{ label: "step", value: (_, raw) => (raw === null ? "–" : `${raw}`) }, ...series],
  };
}
