// Members that the others wait for, and by what.

import type { CrewHealth, Straggler } from "../gen/shanty/v1/status_pb";
import { count, duration, shortId } from "../text/format";
import { Table, type Column } from "./Table";

const beside = (own: number, median: number): string => `${duration(own)} (crew ${duration(median)})`;

const columns: Column<Straggler>[] = [
  { name: "Worker", cell: ({ workerId }) => <code title={workerId}>{shortId(workerId)}</code> },
  { name: "Late by", cell: ({ cause }) => cause },
  { name: "Compute", number: true, cell: ({ computeSeconds, medianComputeSeconds }) => beside(computeSeconds, medianComputeSeconds) },
  { name: "Data", number: true, cell: ({ dataSeconds, medianDataSeconds }) => beside(dataSeconds, medianDataSeconds) },
  { name: "Reduction", number: true, cell: ({ reduceSeconds, medianReduceSeconds }) => beside(reduceSeconds, medianReduceSeconds) },
  { name: "Steps in a row", number: true, cell: ({ steps }) => count(steps) },
];

export function Stragglers({ crew }: { crew: CrewHealth }) {
  return <Table caption="Stragglers" columns={columns} rows={crew.stragglers} rowKey={({ workerId }) => workerId} empty="Nobody keeps the others waiting." />;
}
