//! Which checkpoint is meant: a number, and where two have it also when it was taken.

use std::fmt;
use std::str::FromStr;

/// A checkpoint's number, or its number and when it was taken. Numbers begin anew on a host that lost its store, so a copy from
/// elsewhere may have the number of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Which {
    /// Its number.
    pub sequence: u64,
    /// When it was taken, milliseconds since the Unix epoch; `None` where the number alone is to tell.
    pub unix_ms: Option<u64>,
}

impl Which {
    /// The one of `found` (number, time) that is meant; with several the names of all of them.
    pub(super) fn only(
        self,
        found: impl Iterator<Item = (u64, u64)>,
    ) -> Result<Option<(u64, u64)>, Vec<String>> {
        let meant: Vec<(u64, u64)> = found.filter(|found| self.is(*found)).collect();
        match meant.as_slice() {
            [] => Ok(None),
            [only] => Ok(Some(*only)),
            several => Err(several.iter().map(|(n, ms)| format!("{n}-{ms}")).collect()),
        }
    }

    fn is(self, (sequence, unix_ms): (u64, u64)) -> bool {
        self.sequence == sequence && self.unix_ms.is_none_or(|wanted| wanted == unix_ms)
    }
}

impl From<u64> for Which {
    fn from(sequence: u64) -> Self {
        Self {
            sequence,
            unix_ms: None,
        }
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unix_ms {
            Some(unix_ms) => write!(f, "{}-{unix_ms}", self.sequence),
            None => write!(f, "{}", self.sequence),
        }
    }
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |digits: &str| {
            digits
                .parse()
                .map_err(|_no_number| format!("`{text}` is neither a number nor NUMBER-UNIXMS"))
        };
        let (sequence, unix_ms) = match text.split_once('-') {
            Some((sequence, unix_ms)) => (sequence, Some(number(unix_ms)?)),
            None => (text, None),
        };
        Ok(Self {
            sequence: number(sequence)?,
            unix_ms,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_two_have_needs_the_time() {
        let found = [(3, 10), (3, 20), (4, 30)];
        let only = |text: &str| text.parse::<Which>().unwrap().only(found.into_iter());
        assert_eq!((only("4"), only("5")), (Ok(Some((4, 30))), Ok(None)));
        assert_eq!((only("3-20"), only("3-30")), (Ok(Some((3, 20))), Ok(None)));
        assert_eq!(only("3"), Err(vec!["3-10".to_owned(), "3-20".to_owned()]));
        for bad in ["", "-", "3-", "-3", "x", "3-x"] {
            assert!(bad.parse::<Which>().is_err(), "{bad}");
        }
        assert_eq!("000000000003-20".parse::<Which>().unwrap().to_string(), "3-20");
    }
}
