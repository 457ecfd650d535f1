//! A panic while the screen is drawn on: the terminal is given back, and what went wrong is to be read.

use shanty_testkit::pty::Terminal;
use shanty_tui::{state::App, terminal::Screen, view::Theme};

/// Set for the process that is to panic.
const CHILD: &str = "SHANTY_TUI_TEST_PANICS";

#[test]
fn a_panic_leaves_the_terminal_as_it_was_and_is_told_there() {
    if std::env::var_os(CHILD).is_some() {
        let mut screen = Screen::take().unwrap();
        screen.draw(&App::new("http://head:7461"), Theme { color: true, unicode: true }).unwrap();
        panic!("the plank broke");
    }
    let itself = std::env::current_exe().unwrap();
    let name = "a_panic_leaves_the_terminal_as_it_was_and_is_told_there";
    let arguments = ["--exact", name, "--nocapture", "--test-threads", "1"];
    let mut terminal =
        Terminal::start(&itself, &arguments, &[(CHILD, "1"), ("RUST_BACKTRACE", "0")], (80, 24)).unwrap();
    let status = terminal.wait_for_end().unwrap();
    assert!(!status.success(), "it panicked");
    terminal.wait_for("what went wrong", |text| text.contains("the plank broke")).unwrap();
    terminal.wait_until_as_it_was().unwrap();
    assert!(
        !terminal.text().contains("asks for the jobs"),
        "nothing of the page is left: {}",
        terminal.text()
    );
}
