//! Who works: state, step, beat, place, where a step's time goes, who holds the others up, what the card says.

use ratatui::{
    Frame,
    layout::Rect,
    style::Style,
    text::{Line, Span},
};
use shanty_proto::v1::{CrewHealth, DeviceFacts, JobStatus, Member, MemberPhase, StepTimings, Straggler};

use super::{
    Theme, say_from,
    table::{Cell, plain, table},
};
use crate::{
    format,
    state::{App, Job},
    words::{is_over, phase_name},
};

/// A beat that is this old is worth a mark.
const OLD_BEAT_SECONDS: f64 = 2.0;
/// From this width on, all columns have room.
const WIDE: u16 = 120;

pub(super) fn draw(
    frame: &mut Frame<'_>,
    area: Rect,
    app: &App,
    job: &Job,
    status: &JobStatus,
    theme: Theme,
) {
    let mut lines = vec![summary(status, theme)];
    lines.push(Line::default());
    lines.extend(rows(app, job, status, area.width, theme));
    let wide = area.width >= WIDE;
    let crew = status.crew.as_ref();
    if !wide {
        lines.push(Line::default());
        lines.extend(timings(job, area.width, theme));
    }
    lines.push(Line::default());
    lines.extend(devices(job, area.width, theme));
    let stragglers = crew.map(|crew| crew.stragglers.as_slice()).unwrap_or_default();
    lines.push(Line::default());
    lines.extend(straggler_lines(stragglers, theme));
    say_from(frame, area, lines, app.scroll);
}

/// `3 members, 1 lost (rank 2), 1 spare; a step takes 0.21 s, a member is hung after 10 s`
pub(super) fn summary(status: &JobStatus, theme: Theme) -> Line<'static> {
    let living = |member: &&Member| member.rank.is_some() && member.phase() != MemberPhase::Lost;
    let mut parts = vec![format!("generation {}", status.generation)];
    if !is_over(status.state()) {
        parts.push(format!("{} members", status.members.iter().filter(living).count()));
    }
    let named = |member: &Member| match member.rank {
        Some(rank) => format!("rank {rank}"),
        None => member.worker_id.clone(),
    };
    let missing: Vec<String> =
        status.members.iter().filter(|member| member.phase() == MemberPhase::Lost).map(named).collect();
    let mut spans = Vec::new();
    if let Some(crew) = &status.crew {
        parts.extend((!crew.spares.is_empty()).then(|| format!("{} spare", crew.spares.len())));
        parts.push(format!("{} lost so far", crew.losses));
        parts.extend(crew.usual_step_seconds.map(|seconds| format!("a step takes {}", short(seconds))));
        parts.extend(crew.deadline_seconds.map(|seconds| format!("hung after {}", short(seconds))));
        parts.extend(
            (crew.coordinator_restarts > 0)
                .then(|| format!("{} restarts of the coordinator", crew.coordinator_restarts)),
        );
    }
    spans.push(Span::raw(parts.join(", ")));
    if !missing.is_empty() {
        spans.push(Span::styled(format!("  MISSING: {}", missing.join(", ")), theme.bad()));
    }
    Line::from(spans)
}

/// A table of the members; with room, where their time goes too.
pub(super) fn rows(app: &App, job: &Job, status: &JobStatus, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let members = job.members();
    if members.is_empty() {
        let text = if is_over(status.state()) { "nobody works any more" } else { "nobody works yet" };
        return vec![Line::from(text)];
    }
    // A status ages while none comes: so do the beats that it tells of.
    let aged = app.now.saturating_sub(job.received) as f64 / 1000.0;
    let wide = width >= WIDE;
    let mut header = vec!["RANK", "WORKER", "STATE", "STEP", "BEAT"];
    if wide {
        header.extend(["DATA", "COMPUTE", "REDUCE", "UPDATE"]);
    }
    header.extend(["DEVICE", "HOST", "NOTE"]);
    let crew = status.crew.as_ref();
    let row = |member: &&Member| {
        let over = is_over(status.state());
        let mut cells = vec![
            plain(member.rank.map_or("-".to_owned(), |rank| rank.to_string())),
            plain(short_id(&member.worker_id)),
            (phase_name(member.phase()).to_owned(), theme.phase(member.phase())),
            plain(member.step.to_string()),
            beat(member, if over { 0.0 } else { aged }, theme),
        ];
        if wide {
            cells.extend(times(member.timings.as_ref()));
        }
        cells.extend([
            plain(member.device.as_str()),
            plain(format!("{}:{}", member.host, member.pid)),
            note(member, crew, theme),
        ]);
        cells
    };
    table(&header, members.iter().map(row).collect(), width, theme)
}

fn beat(member: &Member, aged: f64, theme: Theme) -> Cell {
    if member.phase() == MemberPhase::Lost {
        return plain("-");
    }
    let age = member.beat_age_seconds + aged;
    let style = if age >= OLD_BEAT_SECONDS { theme.warning() } else { Style::new() };
    (format!("{age:.1} s"), style)
}

fn note(member: &Member, crew: Option<&CrewHealth>, theme: Theme) -> Cell {
    let straggles = |one: &&Straggler| one.worker_id == member.worker_id;
    let straggler = crew.and_then(|crew| crew.stragglers.iter().find(straggles));
    let mut notes = Vec::new();
    if let Some(straggler) = straggler {
        notes.push(format!("STRAGGLER ({})", straggler.cause));
    }
    notes.extend(member.draining.then(|| "drains".to_owned()));
    notes.extend((member.restarts > 0).then(|| format!("came back {} times", member.restarts)));
    notes.extend(member.spare.then(|| "spare".to_owned()));
    notes.extend((!member.reason.is_empty()).then(|| member.reason.clone()));
    let style = if member.phase() == MemberPhase::Lost { theme.bad() } else { theme.warning() };
    (notes.join(", "), if notes.is_empty() { Style::new() } else { style })
}

fn times(timings: Option<&StepTimings>) -> [Cell; 4] {
    let cell = |seconds: f64| plain(short(seconds));
    match timings {
        Some(it) => [it.data_seconds, it.compute_seconds, it.reduce_seconds, it.update_seconds].map(cell),
        None => ["-"; 4].map(plain),
    }
}

/// Where the time of a step goes, by member.
fn timings(job: &Job, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let row = |member: &&Member| {
        let mut cells = vec![plain(member.rank.map_or("-".to_owned(), |rank| rank.to_string()))];
        cells.extend(times(member.timings.as_ref()));
        let tokens = member.timings.as_ref().map_or(0, |timings| timings.tokens);
        cells.push(plain(format::count(tokens)));
        cells
    };
    let rows = job.members().iter().map(row).collect();
    table(&["RANK", "DATA", "COMPUTE", "REDUCE", "UPDATE", "TOKENS"], rows, width, theme)
}

/// What cards and processes say.
fn devices(job: &Job, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let row = |member: &&Member| {
        let rank = plain(member.rank.map_or("-".to_owned(), |rank| rank.to_string()));
        let Some(facts) = &member.facts else {
            return [vec![rank], ["-"; 6].map(plain).to_vec(), vec![plain("says nothing yet")]].concat();
        };
        let card = if facts.absent.is_empty() { facts.name.clone() } else { facts.absent.clone() };
        vec![
            rank,
            plain(facts.utilization.map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share))),
            plain(memory(facts)),
            plain(facts.temperature_celsius.map_or("-".to_owned(), |degrees| format!("{degrees:.0} C"))),
            plain(facts.power_watts.map_or("-".to_owned(), |watts| format!("{watts:.0} W"))),
            errors(facts, theme),
            plain(format::bytes(facts.resident_bytes)),
            plain(card),
        ]
    };
    let rows = job.members().iter().map(row).collect();
    table(&["RANK", "BUSY", "MEMORY", "TEMP", "POWER", "ERRORS", "RSS", "CARD"], rows, width, theme)
}

fn memory(facts: &DeviceFacts) -> String {
    match (facts.memory_used_bytes, facts.memory_size_bytes) {
        (Some(used), Some(size)) => format!("{}/{}", format::bytes(used), format::bytes(size)),
        _ => "-".to_owned(),
    }
}

fn errors(facts: &DeviceFacts, theme: Theme) -> Cell {
    match facts.uncorrected_errors {
        Some(0) => plain("0"),
        Some(errors) => (errors.to_string(), theme.bad()),
        None => plain("-"),
    }
}

fn straggler_lines(stragglers: &[Straggler], theme: Theme) -> Vec<Line<'static>> {
    if stragglers.is_empty() {
        return vec![Line::from(Span::styled("no stragglers", theme.faint()))];
    }
    let line = |one: &Straggler| {
        let text = format!(
            "{} holds the others up ({}) since {} steps: compute {} (median {}), data {} ({}), reduce {} ({})",
            short_id(&one.worker_id),
            one.cause,
            one.steps,
            short(one.compute_seconds),
            short(one.median_compute_seconds),
            short(one.data_seconds),
            short(one.median_data_seconds),
            short(one.reduce_seconds),
            short(one.median_reduce_seconds),
        );
        Line::from(Span::styled(text, theme.warning()))
    };
    stragglers.iter().map(line).collect()
}

/// Numbers of workers begin with the time at which they were drawn: their ends tell them apart.
pub(super) fn short_id(worker: &str) -> String {
    let letters = worker.chars().count();
    if letters <= 12 { worker.to_owned() } else { worker.chars().skip(letters - 8).collect() }
}

/// `12 ms`, `3.2 s`.
fn short(seconds: f64) -> String {
    super::times::milliseconds(1000.0 * seconds)
}
