//! A bar on standard error for work that takes long; nothing where no person looks.

use std::io::{self, IsTerminal as _, Stderr, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
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

/// Steps of work that several threads do; each says when it has done one.
#[derive(Debug)]
pub struct Steps {
    done: AtomicU64,
    // Held while a bar is drawn.
    progress: Mutex<Progress>,
}

impl Steps {
    /// Begins a piece of work of `total` steps, shown on standard error when that is a terminal.
    pub fn new(label: impl Into<String>, total: usize) -> Self {
        Self {
            done: AtomicU64::new(0),
            progress: Mutex::new(Progress::new(label, total as u64)),
        }
    }

    /// One more step is done.
    pub fn step(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        self.progress
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .set(done);
    }
}

/// Does work of which nobody knows how far it is, and shows that it goes on, on standard error when that is a terminal.
pub fn during<T>(label: impl Into<String>, work: impl FnOnce() -> T) -> T {
    while_shown(Progress::new(label, 0), work)
}

fn while_shown<T, W: Write + Send>(mut progress: Progress<W>, work: impl FnOnce() -> T) -> T {
    if progress.terminal.is_none() {
        return work();
    }
    let (done, waits) = mpsc::channel::<()>();
    thread::scope(move |scope| {
        scope.spawn(move || {
            while waits.recv_timeout(REDRAW) == Err(RecvTimeoutError::Timeout) {
                progress.set(0);
            }
        });
        let result = work();
        // A panic in there drops it too.
        drop(done);
        result
    })
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

    /// A screen that says when it was drawn on.
    struct Screen<'a>(&'a mut Vec<u8>, mpsc::Sender<()>);

    impl Write for Screen<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend_from_slice(bytes);
            self.1.send(()).ok();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn work_of_unknown_length_is_shown_until_it_is_done() {
        let mut screen = Vec::new();
        let (drawn, wait) = mpsc::channel();
        let terminal = Some(Screen(&mut screen, drawn));
        let progress = Progress::on(terminal, "fitting", 0, Duration::ZERO);
        let answer = while_shown(progress, || wait.recv().map(|()| 7));
        assert_eq!(answer, Ok(7));
        let text = String::from_utf8(screen).unwrap();
        assert!(
            text.starts_with("\r\x1b[Kfitting …") && text.ends_with("\r\x1b[K"),
            "{text:?}"
        );
        assert_eq!(
            while_shown(Progress::on(None::<Vec<u8>>, "x", 0, Duration::ZERO), || 8),
            8
        );
    }

    #[test]
    fn more_than_all_or_an_unknown_total_is_no_trouble() {
        assert!(bar("x", 9, 3).ends_with("100 %"));
        assert_eq!(bar("x", 9, 0), "x …");
        assert!(bar("x", u64::MAX, u64::MAX).ends_with("100 %"));
    }
}
