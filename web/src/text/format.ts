// Numbers, times and sizes as people read them. No locale: the same page says the same everywhere, and tests can compare it.

/** Something that has no value yet. */
export const NONE = "–";

/** A whole number with thin groups: 1 234 567. */
export function count(value: bigint | number): string {
  const text = typeof value === "bigint" ? value.toString() : Math.round(value).toString();
  return text.replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
}

/** Four significant digits, as a loss is read; large and tiny values in powers of ten. */
export function figure(value: number | undefined, digits = 4): string {
  if (value === undefined || Number.isNaN(value)) return NONE;
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-3 ? value.toExponential(digits - 2) : value.toPrecision(digits);
  // 12340 rather than 1.234e+4.
  return (text.includes("e+") && size < 1e6 ? Math.round(value).toString() : text).replace("-", "−").replace("e+", "e");
}

/** A share of one as per cent. */
export function percent(share: number): string {
  if (!Number.isFinite(share)) return NONE;
  const value = share * 100;
  return `${value >= 99.95 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

/** A duration: 350 ms, 4.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h. */
export function duration(seconds: number | undefined): string {
  if (seconds === undefined || !Number.isFinite(seconds) || seconds < 0) return NONE;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  const [days, hours, minutes, rest] = [whole / 86400, (whole % 86400) / 3600, (whole % 3600) / 60, whole % 60].map(Math.floor) as [number, number, number, number];
  if (days > 0) return `${days} d ${hours} h`;
  if (hours > 0) return `${hours} h ${minutes} min`;
  return `${minutes} min ${rest} s`;
}

/** Bytes in binary units. */
export function bytes(value: bigint | number): string {
  let size = Number(value);
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (size < 1024 || unit === "TiB") return unit === "B" ? `${size} B` : `${size.toFixed(size < 10 ? 2 : 1)} ${unit}`;
    size /= 1024;
  }
  return NONE;
}

/** How long ago a moment was, both in milliseconds since 1970; the two clocks may differ a little. */
export function ago(unixMs: bigint | number, now = Date.now()): string {
  const then = Number(unixMs);
  if (then === 0) return NONE;
  const seconds = Math.max(0, (now - then) / 1000);
  return seconds < 1 ? "just now" : `${duration(seconds)} ago`;
}

/** Time of day, for logs and events. */
export function clock(unixMs: bigint | number): string {
  const then = Number(unixMs);
  return then === 0 ? NONE : new Date(then).toTimeString().slice(0, 8);
}

/** Both ends of a long id: those of one moment begin alike, and only their ends tell them apart. */
export function shortId(id: string): string {
  return id.length > 15 ? `${id.slice(0, 2)}…${id.slice(-8)}` : id;
}
