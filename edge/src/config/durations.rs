//! Several durations as the file writes them: a pair and a list of texts.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;

/// `["3s", "12s"]`
pub(super) mod pair {
    use std::time::Duration;

    use serde::ser::SerializeTuple as _;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Span;

    pub(in crate::config) fn serialize<S: Serializer>(
        pair: &[Duration; 2],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(2)?;
        tuple.serialize_element(&Span(pair[0]))?;
        tuple.serialize_element(&Span(pair[1]))?;
        tuple.end()
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[Duration; 2], D::Error> {
        let [first, second] = <[Span; 2]>::deserialize(deserializer)?;
        Ok([first.0, second.0])
    }
}

/// `["1m", "5m"]`
pub(super) mod list {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::Span;

    pub(in crate::config) fn serialize<S: Serializer>(
        list: &[Duration],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().copied().map(Span))
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Duration>, D::Error> {
        let list = Vec::<Span>::deserialize(deserializer)?;
        Ok(list.into_iter().map(|span| span.0).collect())
    }
}

#[derive(Deserialize, Serialize)]
struct Span(#[serde(with = "settings::duration")] Duration);
