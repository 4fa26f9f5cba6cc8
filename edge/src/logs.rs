//! The rate of errors in a service's own output, with the shape of the most frequent one. Shapes hold words alone: whatever has a digit, a
//! quote, a path or anything but letters in it is taken out. A value that is a plain word, such as a name or a passphrase in a line of an
//! error, looks like any other word and stays: shapes are kept with the incident, on the node.
//!
//! After the first step of Drain (He et al., ICWS 2017): tokens that look like parameters are replaced; lines are grouped by what is left.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use theriac_heal::types::FaultClass;

/// Reads the end of one output file again and again. Memory is bounded by [`READ_MAX`] and [`TEMPLATES_MAX`].
#[derive(Debug)]
pub(crate) struct LogWatch {
    path: PathBuf,
    /// Which file, and how much of it was read.
    at: Option<(u64, u64)>,
    /// Lines of errors per look, a moving mean.
    usual: f64,
    /// Looks for which nothing more is told.
    quiet: u32,
}

/// Unusually many errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Burst {
    /// Lines since the last look.
    pub lines: u32,
    /// The most frequent shape.
    pub template: String,
    /// What it speaks for, where that is known.
    pub hint: Option<FaultClass>,
}

impl LogWatch {
    /// Begins at the end of the file as it is at the first look.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            at: None,
            usual: 0.0,
            quiet: 0,
        }
    }

    /// What came since the last look. `None` when it is as usual, or the file cannot be read.
    pub(crate) fn look(&mut self) -> Option<Burst> {
        let text = self.read()?;
        let mut shapes: BTreeMap<String, u32> = BTreeMap::new();
        let mut lines = 0_u32;
        let mut hint = None;
        for line in text.lines().filter(|line| is_error(line)) {
            lines = lines.saturating_add(1);
            hint = hint.or_else(|| hint_of(line));
            let shape = template(line);
            if shapes.contains_key(&shape) || shapes.len() < TEMPLATES_MAX {
                *shapes.entry(shape).or_default() += 1;
            }
        }
        let unusual = lines >= LINES_MIN && f64::from(lines) >= TIMES_USUAL * self.usual;
        self.usual += SMOOTHING * (f64::from(lines) - self.usual);
        self.quiet = self.quiet.saturating_sub(1);
        if !unusual || self.quiet > 0 {
            return None;
        }
        self.quiet = QUIET_LOOKS;
        let (template, _) = shapes.into_iter().max_by_key(|(_, count)| *count)?;
        Some(Burst {
            lines,
            template,
            hint,
        })
    }

    fn read(&mut self) -> Option<String> {
        let mut file = File::open(&self.path).ok()?;
        let found = file.metadata().ok()?;
        let (inode, size) = (found.ino(), found.len());
        let from = match self.at {
            None => size,
            Some((of, read)) if of == inode && read <= size => read.max(size.saturating_sub(READ_MAX)),
            // It began anew.
            Some(_) => size.saturating_sub(READ_MAX),
        };
        file.seek(SeekFrom::Start(from)).ok()?;
        let mut bytes = Vec::new();
        file.take(size - from).read_to_end(&mut bytes).ok()?;
        // A line that is being written is read when it is whole.
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        bytes.truncate(whole);
        self.at = Some((inode, from + whole as u64));
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn is_error(line: &str) -> bool {
    let loud = ["ERROR", "FATAL", "PANIC", "CRITICAL", "panicked at", "Exception"];
    loud.iter().any(|word| line.contains(word)) || line.to_ascii_lowercase().contains("error:")
}

fn hint_of(line: &str) -> Option<FaultClass> {
    let line = line.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|words| line.contains(words));
    if has(&["no space left on device", "disk quota exceeded"]) {
        Some(FaultClass::DiskFull)
    } else if has(&["too many clients", "remaining connection slots"]) {
        Some(FaultClass::ConnectionExhaustion)
    } else if has(&["lock timeout", "deadlock detected"]) {
        Some(FaultClass::LockPileup)
    } else if has(&["connection refused"]) {
        Some(FaultClass::DependencyDown)
    } else if has(&["out of memory", "cannot allocate memory"]) {
        Some(FaultClass::MemoryLeak)
    } else {
        None
    }
}

/// The words of a line; everything else is `<*>`, and of several in a row one is left.
fn template(line: &str) -> String {
    let mut shape = String::new();
    let mut quoted = None;
    let mut last_was_gap = false;
    for token in line.split_whitespace() {
        let opened = token.chars().find(|c| matches!(c, '"' | '\'' | '`'));
        let inside = quoted.is_some() || opened.is_some();
        match (quoted, opened) {
            (None, Some(quote)) if token.matches(quote).count() % 2 == 1 => quoted = Some(quote),
            (Some(quote), _) if token.matches(quote).count() % 2 == 1 => quoted = None,
            _ => {}
        }
        let bare =
            token.trim_matches(|c: char| matches!(c, '.' | ',' | ':' | ';' | '(' | ')' | '[' | ']' | '!'));
        let word = !inside && !bare.is_empty() && bare.bytes().all(|byte| byte.is_ascii_alphabetic());
        if !word && last_was_gap {
            continue;
        }
        let part = if word { token } else { "<*>" };
        if shape.len() + part.len() >= TEMPLATE_BYTES_MAX {
            break;
        }
        if !shape.is_empty() {
            shape.push(' ');
        }
        shape.push_str(part);
        last_was_gap = !word;
    }
    shape
}

/// Most bytes read at one look.
const READ_MAX: u64 = 256 << 10;
/// Most shapes told apart at one look.
const TEMPLATES_MAX: usize = 64;
const TEMPLATE_BYTES_MAX: usize = 160;
/// Fewer lines than this are never unusual.
const LINES_MIN: u32 = 5;
/// So many times the usual are.
const TIMES_USUAL: f64 = 5.0;
const SMOOTHING: f64 = 0.05;
/// Looks after a burst in which the same trouble is not told again.
const QUIET_LOOKS: u32 = 5;

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_burst_is_told_once_by_its_most_frequent_shape_and_no_value_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = File::create(&path).unwrap();
        writeln!(file, "ERROR from before").unwrap();
        let mut watch = LogWatch::new(path.clone());
        assert_eq!(watch.look(), None, "what was there before is not read");
        for number in 0..7 {
            writeln!(file, "2026-11-25 10:00:0{number} ERROR: could not write to file \"base/{number} of alice\": No space left on device").unwrap();
        }
        writeln!(file, "all is well").unwrap();
        write!(file, "ERROR half a li").unwrap();
        let burst = watch.look().unwrap();
        assert_eq!(
            (burst.lines, burst.template.as_str(), burst.hint),
            (
                7,
                "<*> ERROR: could not write to file <*> No space left on device",
                Some(FaultClass::DiskFull)
            )
        );
        writeln!(file, "ne").unwrap();
        assert_eq!(watch.look(), None, "one line is no burst");
        // Begun anew, as a bounded output file is.
        let mut file = File::create(&path).unwrap();
        writeln!(file, "fine").unwrap();
        assert_eq!(watch.look(), None);
    }

    #[test]
    fn what_is_usual_is_no_burst() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = File::create(&path).unwrap();
        let mut watch = LogWatch::new(path);
        watch.look();
        let bursts = (0..200)
            .filter(|_| {
                (0..8).for_each(|n| writeln!(file, "error: client {n} went away").unwrap());
                watch.look().is_some()
            })
            .count();
        assert!(bursts < 8, "{bursts} bursts of what always comes");
    }

    #[test]
    fn values_never_stay_in_a_shape() {
        for (line, shape) in [
            (
                "FATAL: password of alice42 is 's3cr t x' in /etc/x",
                "FATAL: password of <*> is <*> in <*>",
            ),
            ("ERROR key (id)=(7) user@example.org", "ERROR key <*>"),
        ] {
            assert_eq!(template(line), shape);
        }
    }
}
