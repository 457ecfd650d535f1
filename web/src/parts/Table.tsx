// A table that a phone shows as cards: each cell knows its column's name.

import type { ComponentChildren } from "preact";

export interface Column<Row> {
  name: string;
  /** Shown at its head in place of the name. */
  label?: ComponentChildren;
  cell: (row: Row) => ComponentChildren;
  /** Numbers are set to the right. */
  number?: boolean;
  /** Words, which take the room that is left. */
  wide?: boolean;
}

interface Props<Row> {
  caption: string;
  columns: readonly Column<Row>[];
  rows: readonly Row[];
  rowKey: (row: Row) => string;
  empty: string;
}

export function Table<Row>({ caption, columns, rows, rowKey, empty }: Props<Row>) {
  if (rows.length === 0) return <p class="muted">{empty}</p>;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={`${caption}, table`}>
      <table>
        <caption class="unseen">{caption}</caption>
        <thead>
          <tr>
            {columns.map(({ name, label, number }) => (
              <th key={name} scope="col" class={number ? "number" : undefined}>
                {label ?? name}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={rowKey(row)}>
              {columns.map(({ name, cell, number, wide }) => (
                <td key={name} data-name={name} class={number ? "number" : wide ? "words" : undefined}>
                  {cell(row)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
