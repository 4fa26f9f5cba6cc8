//! Pressure stall information of the kernel: the share of time in which tasks wait for a resource.

use std::path::Path;

/// Shares of the last ten seconds, 0 to 1; `None` where the kernel does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    /// Some task waited for a processor.
    pub cpu_some: Option<f64>,
    /// Every task that could run waited for memory.
    pub memory_full: Option<f64>,
    /// Every task that could run waited for a disk.
    pub io_full: Option<f64>,
}

impl Pressure {
    /// Reads `cpu`, `memory` and `io` in a directory such as `/proc/pressure`.
    pub fn read(directory: &Path) -> Self {
        let of = |file: &str, word: &str| {
            let text = std::fs::read_to_string(directory.join(file)).ok()?;
            average(&text, word)
        };
        Self {
            cpu_some: of("cpu", "some"),
            memory_full: of("memory", "full"),
            io_full: of("io", "full"),
        }
    }

    /// The host's.
    pub fn of_host() -> Self {
        Self::read(Path::new("/proc/pressure"))
    }
}

/// `avg10` of the line that begins with `word`, as a share.
fn average(text: &str, word: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))?;
    let field = line.split(' ').find_map(|field| field.strip_prefix("avg10="))?;
    let percent: f64 = field.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_line_and_field_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let io = "some avg10=41.50 avg60=0.43 avg300=0.41 total=16\nfull avg10=12.25 avg60=0.20 avg300=0.21 total=54\n";
        std::fs::write(dir.path().join("io"), io).unwrap();
        std::fs::write(dir.path().join("cpu"), "some avg10=nan total=1\n").unwrap();
        let read = Pressure::read(dir.path());
        assert_eq!(read.io_full, Some(0.1225));
        assert_eq!((read.cpu_some, read.memory_full), (None, None));
    }

    #[test]
    fn what_is_no_share_is_unknown() {
        for text in ["", "full", "full avg10=", "full avg10=101.0", "fuller avg10=1.0"] {
            assert_eq!(average(text, "full"), None, "{text}");
        }
    }
}
