//! The kernel's table of TCP sockets, as far as it is about one port, read no more often than its length allows.
//!
//! `/proc/net/tcp` has a line for every socket of the host, also those that only wait for stragglers (state 06): at a few hundred requests a second, each
//! over a connection of its own, some ten thousand lines that the kernel takes tens of milliseconds to write out.

use std::time::{Duration, Instant};

/// The lines of one port.
#[derive(Debug)]
pub(crate) struct SocketTable {
    /// As the kernel writes a port.
    port: String,
    lines: String,
    read: Option<Instant>,
    cost: Duration,
}

impl SocketTable {
    /// Nothing is read yet.
    pub(crate) fn of(port: u16) -> Self {
        Self {
            port: format!(":{port:04X} "),
            lines: String::new(),
            read: None,
            cost: Duration::ZERO,
        }
    }

    /// When they were read.
    pub(crate) fn read_at(&self) -> Option<Instant> {
        self.read
    }

    /// The lines, read anew when the last reading is long enough ago: all readings together take a two-hundredth of the time while all is `well`,
    /// a twentieth while it is not: while the service does not answer, or much is sent again.
    pub(crate) fn lines(&mut self, well: bool) -> &str {
        let share = if well { SHARE_WELL } else { SHARE_ILL };
        if self.read.is_none_or(|read| read.elapsed() >= self.cost * share) {
            return self.anew();
        }
        &self.lines
    }

    /// The lines as they are now.
    pub(crate) fn anew(&mut self) -> &str {
        let begun = Instant::now();
        self.lines.clear();
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            if let Ok(table) = std::fs::read_to_string(table) {
                self.lines.extend(kept(&table, &self.port));
            }
        }
        let now = Instant::now();
        (self.read, self.cost) = (Some(now), now - begun);
        &self.lines
    }
}

/// Lines with the port at either end, without those of connections that are over, each ended.
fn kept<'a>(table: &'a str, port: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = table.split_inclusive('\n').skip(1);
    lines.filter(move |line| line.contains(port) && line.split_ascii_whitespace().nth(3) != Some(TIME_WAIT))
}

/// The state of a connection that is over, for stragglers.
const TIME_WAIT: &str = "06";
/// So many times as long as a reading took nothing is read after it, while all is well.
const SHARE_WELL: u32 = 200;
/// And while it is not.
const SHARE_ILL: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n   \
        1: 0100007F:1F90 0100007F:A001 06 00000000:00000000 03:00000014 00000000     0\n   \
        2: 0100007F:A002 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0\n   \
        3: 0100007F:1F91 0100007F:A003 01 00000000:00000000 00:00000000 00000000     0\n";

    #[test]
    fn lines_of_other_ports_and_of_connections_that_are_over_are_left_out() {
        let found: Vec<&str> = kept(TABLE, ":1F90 ").map(str::trim_start).collect();
        assert!(
            found.len() == 2 && found[0].starts_with("0:") && found[1].starts_with("2:"),
            "{found:?}"
        );
    }

    #[test]
    fn a_long_table_is_read_as_rarely_as_its_reading_took_long() {
        let mut table = SocketTable::of(1);
        table.anew();
        // As if it had taken an hour, and been read just now.
        let read = table.read;
        table.cost = Duration::from_hours(1);
        table.lines(false);
        assert_eq!(
            (table.read, table.cost),
            (read, Duration::from_hours(1)),
            "not read again"
        );
        table.cost = Duration::ZERO;
        table.lines(true);
        assert!(table.read > read, "read again");
    }
}
