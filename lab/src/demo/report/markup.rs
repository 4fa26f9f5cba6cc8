//! Text into markup: escaping, numbers for people, and the one way to write them.

use std::fmt::{Display, Write as _};

/// A growing page. Everything that is not markup of our own goes through [`escape`].
#[derive(Debug, Default)]
pub(crate) struct Page(String);

impl Page {
    /// Adds markup as it is.
    pub(crate) fn raw(&mut self, markup: impl Display) -> &mut Self {
        write!(self.0, "{markup}").unwrap_or_default(); // writing to a string cannot fail
        self
    }

    /// Adds text, escaped.
    pub(crate) fn text(&mut self, text: impl Display) -> &mut Self {
        self.0.push_str(&escape(text));
        self
    }

    /// The page so far.
    pub(crate) fn finish(self) -> String {
        self.0
    }
}

/// `text` with the five characters that mean something in markup replaced, and control characters dropped.
pub(crate) fn escape(text: impl Display) -> String {
    let text = text.to_string();
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Seconds for people: `0.84 s`, `12.3 s`, `104 s`.
pub(crate) fn seconds(value: f64) -> String {
    match value {
        // Clocks here count milliseconds: less than one is still one.
        v if v < 0.1 => format!("{:.0} ms", (v * 1e3).max(1.0)),
        v if v < 9.995 => format!("{v:.2} s"),
        v if v < 99.95 => format!("{v:.1} s"),
        v => format!("{v:.0} s"),
    }
}

/// Seconds, or a dash where there is nothing.
pub(crate) fn maybe_seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "never".to_owned(), seconds)
}

/// Bytes for people, in powers of 1000: `815 B`, `12.4 kB`, `3.1 MB`.
pub(crate) fn bytes(value: u64) -> String {
    let value = value as f64;
    match value {
        v if v < 1e3 => format!("{v:.0} B"),
        v if v < 1e6 => format!("{:.1} kB", v / 1e3),
        v if v < 1e9 => format!("{:.1} MB", v / 1e6),
        v => format!("{:.2} GB", v / 1e9),
    }
}

/// A whole number with thin spaces between thousands.
pub(crate) fn whole(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

/// `1 round`, `2 rounds`.
pub(crate) fn counted(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", whole(value), if value == 1 { "" } else { "s" })
}

/// A reason as people read it: `norm_exceeded` becomes `norm exceeded`.
pub(crate) fn words(code: &str) -> String {
    code.replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_typed_by_a_peer_becomes_markup() {
        assert_eq!(
            escape("<b a=\"x\">&'\u{7}"),
            "&lt;b a=&quot;x&quot;&gt;&amp;&#39; "
        );
    }

    #[test]
    fn figures_read_like_a_person_wrote_them() {
        assert_eq!(seconds(0.0), "1 ms");
        assert_eq!(
            [seconds(0.04), seconds(0.836), seconds(12.34), seconds(120.4)],
            ["40 ms", "0.84 s", "12.3 s", "120 s"]
        );
        assert_eq!(
            [bytes(815), bytes(12_400), bytes(3_100_000)],
            ["815 B", "12.4 kB", "3.1 MB"]
        );
        assert_eq!(
            [whole(7), whole(1234), whole(1_234_567)],
            ["7", "1\u{202f}234", "1\u{202f}234\u{202f}567"]
        );
        assert_eq!(
            [counted(1, "round"), counted(2, "round")],
            ["1 round", "2 rounds"]
        );
    }
}
