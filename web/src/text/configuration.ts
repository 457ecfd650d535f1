// A job file as rows of key and value, as they are written in it.

/** Keys with dots, and values as in TOML; keys without a value are left out. */
export function rowsOf(json: string): [string, string][] {
  const rows: [string, string][] = [];
  walk("", JSON.parse(json) as unknown, rows);
  return rows;
}

function walk(key: string, value: unknown, rows: [string, string][]): void {
  if (value === null || value === undefined) return;
  if (typeof value === "object" && !Array.isArray(value)) {
    for (const [name, inner] of Object.entries(value)) walk(key === "" ? name : `${key}.${name}`, inner, rows);
    return;
  }
  rows.push([key, JSON.stringify(value)]);
}
