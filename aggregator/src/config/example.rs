//! The commented `aggregator.toml`, written from the same settings that are read, so that it cannot drift.

use std::time::Duration;

use super::{RoundKind, Settings};
use crate::floor::FloorUnit;

/// The commented file that `init` writes, with every key at the value of `settings`.
pub fn example(settings: &Settings) -> String {
    let (rounds, model, limits) = (&settings.rounds, &settings.model, &settings.limits);
    let floor = &settings.privacy_floor;
    let floor_word = |unit| match unit {
        FloorUnit::Block => "block",
        FloorUnit::Record => "record",
    };
    let text = |value: &str| toml::Value::String(value.to_owned()).to_string();
    let time = |span: Duration| text(&humantime::format_duration(span).to_string());
    let or_comment = |key: &str, value: Option<String>, other: &str| match value {
        Some(value) => format!("{key} = {value}"),
        None => format!("# {key} = {other}"),
    };
    let kind = match rounds.kind {
        RoundKind::Moments => "moments",
        RoundKind::Delta => "delta",
    };
    let real = |value: f64| toml::Value::Float(value).to_string();
    format!(
        r#"# theriac-aggregator: everything this aggregator runs on. Check it with
#   theriac-aggregator check-config --config aggregator.toml
# A key can be overridden from the environment: THERIAC__ROUNDS__QUORUM=5.

# Name of the federation, part of every certificate: it cannot be changed after `init`.
federation = {federation}
# Database, blobs, authorities and keys, relative to this file's directory.
data_dir = {data_dir}
# UDP. Edges connect here. Port 0 takes a free one.
listen = "{listen}"
# UDP. New edges hand in their token here.
join_listen = "{join_listen}"
# TCP, loopback only: /healthz /readyz /metrics /status /rounds. It has no login.
http = "{http}"
# HOST:PORT that a new edge is told to connect to. Its host must be in the aggregator's certificate (init --hosts).
{advertise}

[rounds]
# What an edge sends: "moments" (one noised release of second moments) or "delta" (a clipped weight delta).
kind = "{kind}"
# Fewest updates that make a model, 1 to 100000. Too low: a few edges decide. Too high: rounds abort.
quorum = {quorum}
# Time from announcement to close, 100ms to 7days. Too short: slow edges are charged and come late.
deadline = {deadline}
# Time between a round's end and the next announcement, up to 30days. Too short spends the edges' privacy budget.
pause = {pause}
# No round opens after this number. For experiments.
{rounds_max}
# Clipping norm C of one privacy unit, above 0. Too low: signal is cut off. Too high: the noise, σC, drowns it.
clip_norm = {clip_norm}
# Noise multiplier σ that every update must carry, 0.1 to 1000. Too low: edges decline. Too high: nothing is learnt.
noise_multiplier = {noise_multiplier}
# Samples in one block, the privacy unit of moments, 11 to 86400.
block_rows = {block_rows}
# An edge with fewer complete unspent blocks declines, 1 to blocks_max.
blocks_min = {blocks_min}
# Most blocks in one release, 1 to 100000. It bounds an honest update's norm: too high lets a hostile edge send more.
blocks_max = {blocks_max}
# "mean", "median" or "trimmed_mean".
rule = "{rule}"
# Hostile edges to withstand, below half the quorum. Too small: arbitrary failure. Too large: honest sites are cut away.
byzantine = {byzantine}

[model]
# Feature profile of all edges.
profile = {profile}
# Instead of a profile, for load tests: a model of that many bare numbers, 1 to 16000000, with kind = "delta".
{dimension}
# Seed of the initial model; edges compute the same one from it.
seed = {seed}

[limits]
# Connections at one time, 1 to 100000; beyond it new ones are told to come back later.
connections_max = {connections_max}
# Bytes of updates in memory while they are checked and stored, 1048576 to 68719476736; beyond it uploads are refused.
upload_bytes_in_flight_max = {upload_bytes}
# Messages one edge may send in one round, 4 to 1000000; beyond it the connection is closed.
messages_per_round_max = {messages}
# Bytes one edge may send in one round, as a multiple of one update's size, 1 to 1000.
updates_per_round_max = {updates}
# Time an edge has to take a message, 1s to 10m; slower ones are closed.
write_timeout = {write_timeout}
# Rounds whose updates are kept after they end, 1 to 1000000; older payloads are deleted, their records stay.
rounds_kept = {rounds_kept}

[privacy_floor]
# The weakest guarantee whose updates are taken, held to what each site declares. Without any key nothing is asked.
# "block" turns sites away that hide only single records.
{floor_unit}
# Shortest block, 1s to 31days.
{block_min}
# Largest epsilon of one period, above 0 to 100, and largest delta, above 0 to 0.001.
{epsilon_max}
{delta_max}
# Whether somebody must have signed the site's policy.
signed = {signed}
"#,
        federation = text(&settings.federation),
        data_dir = text(&settings.data_dir.to_string_lossy()),
        listen = settings.listen,
        join_listen = settings.join_listen,
        http = settings.http,
        advertise = or_comment(
            "advertise",
            settings.advertise.as_deref().map(text),
            "\"localhost:7700\""
        ),
        quorum = rounds.quorum,
        deadline = time(rounds.deadline),
        pause = time(rounds.pause),
        rounds_max = or_comment("rounds_max", rounds.rounds_max.map(|n| n.to_string()), "1000"),
        clip_norm = real(rounds.clip_norm),
        noise_multiplier = real(rounds.noise_multiplier),
        block_rows = rounds.block_rows,
        blocks_min = rounds.blocks_min,
        blocks_max = rounds.blocks_max,
        rule = rounds.rule,
        byzantine = rounds.byzantine,
        profile = text(&model.profile),
        dimension = or_comment("dimension", model.dimension.map(|n| n.to_string()), "10000"),
        seed = model.seed,
        connections_max = limits.connections_max,
        upload_bytes = limits.upload_bytes_in_flight_max,
        messages = limits.messages_per_round_max,
        updates = limits.updates_per_round_max,
        write_timeout = time(limits.write_timeout),
        rounds_kept = limits.rounds_kept,
        floor_unit = or_comment("unit", floor.unit.map(floor_word).map(text), "\"block\""),
        block_min = or_comment("block_min", floor.block_min.map(time), "\"1h\""),
        epsilon_max = or_comment("epsilon_max", floor.epsilon_max.map(real), "4.0"),
        delta_max = or_comment("delta_max", floor.delta_max.map(real), "1e-6"),
        signed = floor.signed,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Settings {
        Settings {
            federation: "demo".into(),
            ..Settings::default()
        }
    }

    #[test]
    fn example_says_exactly_the_settings_it_was_made_from() {
        let mut changed = good();
        changed.advertise = Some("a.example:1".into());
        changed.rounds.rounds_max = Some(9);
        changed.rounds.kind = RoundKind::Delta;
        changed.model.dimension = Some(10);
        changed.privacy_floor = crate::floor::FloorSettings {
            unit: Some(FloorUnit::Block),
            block_min: Some(Duration::from_hours(1)),
            epsilon_max: Some(4.0),
            delta_max: Some(1e-6),
            signed: true,
        };
        for settings in [good(), changed] {
            let parsed: Settings = toml::from_str(&example(&settings)).unwrap();
            assert_eq!(parsed, settings);
        }
    }

    #[test]
    fn example_names_every_key() {
        let table = toml::Table::try_from(good()).unwrap();
        let text = example(&good());
        let mut sections = vec![&table];
        while let Some(section) = sections.pop() {
            for (key, value) in section {
                assert!(text.contains(key.as_str()), "{key} is not in the example");
                sections.extend(value.as_table());
            }
        }
    }
}
