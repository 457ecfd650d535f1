// The frame around every page.

import { refused, signOut, token } from "./api/session";
import { roleWord, who } from "./api/who";
import { Compare } from "./pages/Compare";
import { Job } from "./pages/Job";
import { Jobs } from "./pages/Jobs";
import { Queue } from "./pages/Queue";
import { SignIn } from "./pages/SignIn";
import { route, type Route } from "./router";
import { next, theme } from "./theme";

export function App() {
  return (
    <>
      <a class="skip" href="#main">
        To the content
      </a>
      <header>
        <a class="brand" href="/">
          <img src="/icon.svg" alt="" width="26" height="26" /> Shanty
        </a>
        <nav aria-label="Pages">
          <a href="/" aria-current={route.value.page === "jobs" ? "page" : undefined}>
            Jobs
          </a>
          <a href="/queue" aria-current={route.value.page === "queue" ? "page" : undefined}>
            Queue
          </a>
        </nav>
        <button type="button" onClick={next} title="Change colours" aria-describedby="colours">
          <span aria-hidden="true">{theme.value === "system" ? "◐ " : theme.value === "dark" ? "● " : "○ "}</span>
          {theme.value === "system" ? "auto" : theme.value}
        </button>
        <span id="colours" class="unseen">
          Changes the colours
        </span>
        {who.value ? (
          <span class="who muted" title={`coordinator ${who.value.coordinatorVersion}`}>
            {who.value.asks ? `${who.value.name}: ${roleWord.value}` : "asks nobody who they are"}
          </span>
        ) : null}
        {token.value ? (
          <button type="button" onClick={signOut}>
            Sign out
          </button>
        ) : null}
      </header>
      <main id="main" tabIndex={-1}>
        {refused.value === null ? <Page route={route.value} /> : <SignIn reason={refused.value} />}
      </main>
    </>
  );
}

function Page({ route }: { route: Route }) {
  switch (route.page) {
    case "jobs":
      return <Jobs />;
    case "queue":
      return <Queue />;
    case "job":
      return <Job id={route.job} key={route.job} />;
    case "compare":
      return <Compare ids={route.jobs} />;
    case "missing":
      return (
        <>
          <h1>No such page</h1>
          <p>
            There is nothing at <code>{route.path}</code>. <a href="/">All jobs</a>
          </p>
        </>
      );
  }
}
