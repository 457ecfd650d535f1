use super::*;

fn press(app: &mut App, code: KeyCode) -> Option<Wish> {
    app.update(Input::Key(KeyEvent::new(code, KeyModifiers::NONE)))
}

fn news(app: &mut App, news: News) {
    assert_eq!(app.update(Input::News(news)), None);
}

fn job(id: &str, state: JobState, submitted: u64) -> JobSummary {
    JobSummary {
        job_id: id.to_owned(),
        state: state.into(),
        submitted_unix_ms: submitted,
        ..JobSummary::default()
    }
}

#[test]
fn the_cursor_stays_on_its_job_when_the_list_moves() {
    let mut app = App::new("http://head:7461");
    news(&mut app, News::Jobs(vec![job("a", JobState::Running, 1), job("b", JobState::Running, 2)]));
    press(&mut app, KeyCode::Down);
    let under = |app: &App| app.jobs.as_ref().and_then(|jobs| Some(jobs.get(app.selected)?.job_id.clone()));
    assert_eq!(under(&app).as_deref(), Some("a"), "the newest is first");
    let more = ["c", "d"].map(|id| job(id, JobState::Running, 9));
    let jobs = [job("a", JobState::Running, 1), job("b", JobState::Succeeded, 2)].into_iter().chain(more);
    news(&mut app, News::Jobs(jobs.collect()));
    assert_eq!(under(&app).as_deref(), Some("a"));
    assert_eq!(press(&mut app, KeyCode::Enter), Some(Wish::Watch("a".to_owned())));
    assert_eq!(press(&mut app, KeyCode::Esc), Some(Wish::Unwatch));
    for _ in 0..9 {
        press(&mut app, KeyCode::Down);
    }
    assert_eq!(under(&app).as_deref(), Some("b"), "those that ended stand last");
}

#[test]
fn keys_go_round_the_tabs_and_digits_jump() {
    let mut app = App::new("x").showing("a");
    for tab in Tab::ALL.into_iter().cycle().skip(1).take(6) {
        press(&mut app, KeyCode::Tab);
        assert_eq!(app.page, Page::Job(tab));
    }
    press(&mut app, KeyCode::BackTab);
    assert_eq!(app.page, Page::Job(Tab::Logs));
    press(&mut app, KeyCode::Char('3'));
    assert_eq!(app.page, Page::Job(Tab::Recoveries));
    assert_eq!(press(&mut app, KeyCode::Char('q')), Some(Wish::Quit));
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(app.update(Input::Key(control_c)), Some(Wish::Quit));
}

#[test]
fn a_filter_takes_letters_that_are_keys_elsewhere() {
    let mut app = App::new("x").showing("a");
    press(&mut app, KeyCode::Char('6'));
    press(&mut app, KeyCode::Char('/'));
    for letter in "quit 1".chars() {
        assert_eq!(press(&mut app, KeyCode::Char(letter)), None);
    }
    assert_eq!(app.filter, "quit 1");
    press(&mut app, KeyCode::Enter);
    assert!(!app.typing);
    assert_eq!(press(&mut app, KeyCode::Char('q')), Some(Wish::Quit));
}

#[test]
fn a_broken_link_is_lost_since_it_broke_and_up_when_it_is_back() {
    let mut app = App::new("x");
    app.update(Input::Time(1000));
    news(&mut app, News::Connected);
    news(&mut app, News::Lost("refused".to_owned()));
    app.update(Input::Time(5000));
    news(&mut app, News::Lost("still refused".to_owned()));
    assert_eq!(app.link, Link::Lost { since: 1000, reason: "still refused".to_owned() });
    news(&mut app, News::Connected);
    assert_eq!(app.link, Link::Up);
}

#[test]
fn an_event_that_is_told_twice_is_one_and_each_stands_at_its_time() {
    let mut app = App::new("x").showing("a");
    let event = |unix_ms: u64, text: &str| Event { unix_ms, text: text.to_owned(), ..Event::default() };
    news(&mut app, News::Event(event(20, "b")));
    news(&mut app, News::Event(event(20, "c")));
    news(&mut app, News::Events(vec![event(10, "a"), event(20, "b"), event(20, "c"), event(30, "d")]));
    let texts: Vec<&str> =
        app.job.iter().flat_map(|job| &job.events).map(|event| event.text.as_str()).collect();
    assert_eq!(texts, ["a", "b", "c", "d"]);
}

#[test]
fn log_lines_are_chosen_by_level_worker_and_text() {
    let mut app = App::new("x").showing("a");
    let line = |worker: &str, level: &str, text: &str| LogLine {
        unix_ms: 1,
        worker_id: worker.to_owned(),
        level: level.to_owned(),
        text: text.to_owned(),
    };
    let lines = vec![line("w1", "info", "one"), line("w2", "warn", "two"), line("w2", "error", "three")];
    news(&mut app, News::Logs(lines));
    press(&mut app, KeyCode::Char('6'));
    let shown = |app: &App| -> Vec<String> {
        let job = app.job.as_ref().expect("a job is watched");
        job.lines(app.level, &app.filter).map(|line| line.text.clone()).collect()
    };
    assert_eq!(shown(&app), ["one", "two", "three"]);
    press(&mut app, KeyCode::Char('l'));
    assert_eq!(shown(&app), ["two", "three"]);
    press(&mut app, KeyCode::Char('w'));
    assert_eq!(shown(&app), Vec::<String>::new(), "w1 says nothing that bad");
    press(&mut app, KeyCode::Char('w'));
    app.filter = "thr".to_owned();
    assert_eq!(shown(&app), ["three"]);
    press(&mut app, KeyCode::Char('w'));
    assert_eq!(app.job.as_ref().and_then(|job| job.worker.clone()), None, "after the last come all");
}
