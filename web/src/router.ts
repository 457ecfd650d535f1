// Addresses within the page: `/`, `/queue`, `/jobs/ID`, `/compare?job=A&job=B`. The coordinator answers each with the same page.

import { signal } from "@preact/signals";

export type Route = { page: "jobs" } | { page: "queue" } | { page: "job"; job: string } | { page: "compare"; jobs: string[] } | { page: "missing"; path: string };

export function parse(url: URL): Route {
  const parts = url.pathname.split("/").filter(Boolean).map(decoded);
  if (parts.length === 0) return { page: "jobs" };
  if (parts[0] === "queue" && parts.length === 1) return { page: "queue" };
  if (parts[0] === "jobs" && parts.length === 1) return { page: "jobs" };
  if (parts[0] === "jobs" && parts[1] && parts.length === 2) return { page: "job", job: parts[1] };
  if (parts[0] === "compare" && parts.length === 1) return { page: "compare", jobs: url.searchParams.getAll("job") };
  return { page: "missing", path: url.pathname };
}

/** A part of an address; as it is, where it is none that can be read. */
function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const route = signal<Route>({ page: "jobs" });

export function go(path: string): void {
  history.pushState(null, "", path);
  route.value = parse(new URL(location.href));
  scrollTo(0, 0);
}

export const jobPath = (job: string): string => `/jobs/${encodeURIComponent(job)}`;

export const comparePath = (jobs: readonly string[]): string => `/compare?${jobs.map((job) => `job=${encodeURIComponent(job)}`).join("&")}`;

/** Follows the address bar, and links within the page without loading it anew. */
export function start(): void {
  route.value = parse(new URL(location.href));
  addEventListener("popstate", () => (route.value = parse(new URL(location.href))));
  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = (event.target as Element | null)?.closest("a");
    if (!link || link.origin !== location.origin || link.target) return;
    // A place within this page, such as the way past the header.
    if (link.hash && link.pathname === location.pathname && link.search === location.search) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
}
