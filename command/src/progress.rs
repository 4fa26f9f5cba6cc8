//! A bar on standard error for work that takes long; nothing where no person looks.

use std::io::{self, IsTerminal as _, Stderr, Write};
use std::time::{Duration, Instant};

/// Work that is done sooner shows no bar.
const PATIENCE: Duration = Duration::from_millis(400);
/// Time between two drawings.
const REDRAW: Duration = Duration::from_millis(100);
/// Characters of the bar.
const WIDTH: u64 = 24;

/// How far one piece of work is. The bar is wiped when this is dropped.
#[derive(Debug)]
pub struct Progress<W: Write = Stderr> {
    label: String,
    total: u64,
    begun: Instant,
    drawn: Option<Instant>,
    patience: Duration,
    /// `None` where no person looks.
    terminal: Option<W>,
}

impl Progress {
    /// Begins a piece of work of `total` steps (0 = nobody knows), shown on standard error when that is a terminal.
    pub fn new(label: impl Into<String>, total: u64) -> Self {
        let stderr = io::stderr();
        let terminal = stderr.is_terminal().then_some(stderr);
        Progress::on(terminal, label, total, PATIENCE)
    }
}

impl<W: Write> Progress<W> {
    fn on(terminal: Option<W>, label: impl Into<String>, total: u64, patience: Duration) -> Self {
        Self {
            label: label.into(),
            total,
            begun: Instant::now(),
            drawn: None,
            patience,
            terminal,
        }
    }

    /// Says how many steps are done. Cheap: draws at most ten times a second.
    pub fn set(&mut self, done: u64) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        let due = match self.drawn {
            None => self.begun.elapsed() >= self.patience,
            Some(drawn) => drawn.elapsed() >= REDRAW,
        };
        if due {
            self.drawn = Some(Instant::now());
            // A bar that cannot be drawn is no reason to stop the work.
            write!(terminal, "\r\x1b[K{}", bar(&self.label, done, self.total))
                .and_then(|()| terminal.flush())
                .ok();
        }
    }
}

impl<W: Write> Drop for Progress<W> {
    fn drop(&mut self) {
        if let (Some(terminal), Some(_)) = (&mut self.terminal, self.drawn) {
            write!(terminal, "\r\x1b[K").and_then(|()| terminal.flush()).ok();
        }
    }
}

fn bar(label: &str, done: u64, total: u64) -> String {
    if total == 0 {
        return format!("{label} …");
    }
    let done = done.min(total);
    let full = u128::from(done) * u128::from(WIDTH) / u128::from(total);
    let cells: String = (0..u128::from(WIDTH))
        .map(|cell| if cell < full { '█' } else { '░' })
        .collect();
    format!("{label} {cells} {} %", u128::from(done) * 100 / u128::from(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_a_share_and_wipes_itself() {
        let mut screen = Vec::new();
        {
            let mut progress = Progress::on(Some(&mut screen), "reading", 200, Duration::ZERO);
            progress.set(100);
            progress.set(101);
        }
        let text = String::from_utf8(screen).unwrap();
        assert!(text.contains("reading ████████████░░░░░░░░░░░░ 50 %"), "{text}");
        assert_eq!(text.matches('%').count(), 1, "ten times a second at most");
        assert!(text.ends_with("\r\x1b[K"));
    }

    #[test]
    fn short_work_and_work_that_nobody_watches_draw_nothing() {
        let mut screen = Vec::new();
        Progress::on(Some(&mut screen), "reading", 200, Duration::from_mins(1)).set(100);
        assert!(screen.is_empty());
        Progress::on(None::<Vec<u8>>, "reading", 200, Duration::ZERO).set(100);
    }

    #[test]
    fn more_than_all_or_an_unknown_total_is_no_trouble() {
        assert!(bar("x", 9, 3).ends_with("100 %"));
        assert_eq!(bar("x", 9, 0), "x …");
        assert!(bar("x", u64::MAX, u64::MAX).ends_with("100 %"));
    }
}
