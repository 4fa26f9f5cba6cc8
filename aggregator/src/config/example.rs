//! The commented `aggregator.toml`, written from the same settings that are read, so that it cannot drift.

use std::time::Duration;

use super::{RoundKind, Settings};
use crate::floor::FloorUnit;
use crate::validation::Missing;

/// The commented file that `init` writes, with every key at the value of `settings`.
pub fn example(settings: &Settings) -> String {
    let (rounds, model, limits) = (&settings.rounds, &settings.model, &settings.limits);
    let (floor, central) = (&settings.privacy_floor, &settings.central_noise);
    let (quarantine, optimizer) = (&settings.quarantine, &settings.server_optimizer);
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
        RoundKind::Gradient => "gradient",
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
# What an edge sends: "moments" (one noised release of second moments), "gradient" (some twenty rounds of clipped gradients of the
# same blocks; edges need a policy that allows it) or "delta" (a clipped weight delta).
kind = "{kind}"
# Fewest updates that make a model, 1 to 100000. Too low: a few edges decide. Too high: rounds abort.
quorum = {quorum}
# Time from announcement to close, 100ms to 7days. Too short: slow edges are charged and come late.
deadline = {deadline}
# Time between a round's end and the next announcement, up to 30days. Too short spends the edges' privacy budget.
pause = {pause}
# Most updates that one round takes: of more connected edges each round asks others. Without it what the rule can combine: 2048 for rules of
# pairs such as caf, 100000 for "trimmed_mean", "median", "mean".
{updates_max}
# No round opens after this number. For experiments.
{rounds_max}
# Clipping norm C of one privacy unit, above 0. Too low: signal is cut off. Too high: the noise, σC, drowns it. Without it: 17200, for
# gradients 4 for each row of a block after the first ten.
{clip_norm}
# Noise multiplier σ that every update must carry, 0.1 to 1000. Too low: edges decline. Too high: nothing is learnt. Without it: 1.27, for
# gradients 5.69 (epsilon 4 at delta 1e-6 for one release, for twenty).
{noise_multiplier}
# Samples in one block, the privacy unit of moments, 11 to 86400.
block_rows = {block_rows}
# An edge with fewer complete unspent blocks declines, 1 to blocks_max.
blocks_min = {blocks_min}
# Most blocks in one release, 1 to 100000. It bounds an honest update's norm: too high lets a hostile edge send more.
blocks_max = {blocks_max}
# "caf", "nnm+trimmed_mean", "trimmed_mean", "median" or "mean"; docs/robustness.md has all.
rule = "{rule}"
# Hostile edges to withstand, below half the quorum. Too small: arbitrary failure. Too large: honest sites are cut away.
byzantine = {byzantine}
# Whether an update that comes after its round's end is kept for the next one (docs/robustness.md); not with central_noise.
{late_updates}
# How much each earlier round counts in the mean of a site's updates that the rule sees, 0 (off) to 0.99; not with central_noise.
{site_average}
# Whether a site's earlier releases of moments count beside the one at hand (docs/federation.md); not with site_average or central_noise.
{accumulate}
# Most releases of a site that count, 2 to 1000, and how old the rounds that took them in may be, 1m to 1000days.
moments_keep = {moments_keep}
moments_age = {moments_age}
# Sites of your own that try each model on their rows before it is published, at most 16 (docs/robustness.md); each of them must say
# federation.validator = true. One that finds it worse ends the round without a model.
{validators}
# Time for them to answer, 1s to 1h; and without a word that tells anything: "hold" (no model, and no round while none is connected) or "publish".
validation_timeout = {validation_timeout}
validation_missing = "{validation_missing}"

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
# Bytes of a round's updates in memory while they are combined, 0 to 1099511627776; beyond it they lie in a file in data_dir, with the same result.
round_memory_bytes = {round_memory}
# Messages one edge may send in one round, 4 to 1000000; beyond it the connection is closed.
messages_per_round_max = {messages}
# Bytes one edge may send in one round, as a multiple of one update's size, 1 to 1000.
updates_per_round_max = {updates}
# Time an edge has to take a message, 1s to 10m; slower ones are closed.
write_timeout = {write_timeout}
# Rounds whose updates are kept after they end, 1 to 1000000; older payloads are deleted, their records stay.
rounds_kept = {rounds_kept}
# Rounds of which the record about every site is kept, 1 to 1000000; one record takes about 2 KB.
records_kept = {records_kept}

[quarantine]
# Sites whose rows are again and again such as no honest row is are scored at weight 0 until they have earned their way back.
enabled = {quarantined}
# Trust below which a site enters (a new one has 0.8), and from which on it leaves, at most 0.78.
enter_below = {enter_below}
leave_at = {leave_at}

[fleet]
# Account of which nodes are unhealthy, told to edges whose policy has [budgets] fleet, and slots for shared actions (docs/healing.md). Off by default.
enabled = {fleet}
# Most nodes that hold a slot of one kind at a time, in hundredths of those that tell how they are, 1 to 100; one always may.
share = {fleet_share}
# Term of a slot, 1s to 1h: four fifths of it longer than healing.action_timeout of any edge and 35 s, rounded up to ten. After a start nothing is lent for the longest term there was.
lease_ttl = {lease_ttl}
# A node that has told nothing for so long counts no more, 10s to 10m.
state_age = {state_age}

[server_optimizer]
# "fedavg", "fedavgm", "fedadam" or "fedyogi": from the combined changes to the model's step. Only with kind = "delta".
name = "{optimizer}"
# Server rate, 0.000001 to 100; begin at 0.01 with fedadam and fedyogi.
rate = {rate}
# Beta of fedavgm, beta 1 of the others, 0 to below 1; beta 2; and tau, 1e-12 to 1, which keeps noise from being scaled up.
momentum = {momentum}
second_momentum = {second_momentum}
adaptivity = {adaptivity}

[privacy_floor]
# The weakest guarantee whose updates are taken, held to what each site declares. Without any key nothing is asked.
# "block" turns sites away that hide only single records.
{floor_unit}
# Shortest block, 1s to 31days.
{block_min}
# Largest epsilon of one period, above 0 to 100, and largest delta, above 0 to 0.001.
{epsilon_max}
{delta_max}
# Shortest time over which a site's epsilon holds: "month", "quarter", "year", "rolling" (for ever).
{period_min}
# Least noise multiplier that a site's policy may accept, above 0 to 10000.
{floor_sigma}
# Whether somebody must have signed the site's policy; and whose signatures will do. An edge signs its first policy with a key of its own.
signed = {signed}
{signers}
# Whether a site that enrols again with another key, which begins a new ledger, is kept out until `sites allow-ledger`.
ledger_continuity = {ledger_continuity}

[central_noise]
# Noise of this aggregator on top of each site's own, for large fleets that trust it: the unit is a whole site (docs/privacy.md).
# Only with rule = "mean". Off by default.
enabled = {central}
# Raise it with every change of epsilon, delta, noise_multiplier or sampling_rate.
version = {central_version}
# Largest epsilon of any site over all rounds, above 0 to 100; once it is spent no round opens. Delta, above 0 to 0.001.
epsilon = {central_epsilon}
delta = {central_delta}
# Noise on the sum in multiples of clip_norm, 0.3 to 10000.
noise_multiplier = {central_sigma}
# Probability with which a stored update enters the sum, above 0 to 1.
sampling_rate = {central_rate}
# Largest Euclidean norm of one update in the sum, 1e-9 to 1e12.
{central_clip}
# Sites that the fleet is taken to have, 1 to 10000000: the sum is divided by sampling_rate times this public number.
{central_sites}
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
        updates_max = or_comment("updates_max", rounds.updates_max.map(|n| n.to_string()), "2048"),
        rounds_max = or_comment("rounds_max", rounds.rounds_max.map(|n| n.to_string()), "1000"),
        clip_norm = or_comment("clip_norm", rounds.clip_norm.map(real), "17200.0"),
        noise_multiplier = or_comment("noise_multiplier", rounds.noise_multiplier.map(real), "1.27"),
        block_rows = rounds.block_rows,
        blocks_min = rounds.blocks_min,
        blocks_max = rounds.blocks_max,
        rule = rounds.rule,
        byzantine = rounds.byzantine,
        late_updates = or_comment(
            "late_updates",
            rounds.late_updates.map(|on| on.to_string()),
            "true"
        ),
        site_average = or_comment(
            "site_average",
            rounds.site_average.map(real),
            &real(rounds.site_average())
        ),
        accumulate = or_comment("accumulate", rounds.accumulate.map(|on| on.to_string()), "true"),
        moments_keep = rounds.moments_keep,
        moments_age = time(rounds.moments_age),
        validators = or_comment(
            "validators",
            (!rounds.validators.is_empty()).then(|| {
                let names: Vec<String> = rounds.validators.iter().map(|name| text(name)).collect();
                format!("[{}]", names.join(", "))
            }),
            "[\"canary-1\"]",
        ),
        validation_timeout = time(rounds.validation_timeout),
        validation_missing = match rounds.validation_missing {
            Missing::Publish => "publish",
            Missing::Hold => "hold",
        },
        profile = text(&model.profile),
        dimension = or_comment("dimension", model.dimension.map(|n| n.to_string()), "10000"),
        seed = model.seed,
        connections_max = limits.connections_max,
        upload_bytes = limits.upload_bytes_in_flight_max,
        round_memory = limits.round_memory_bytes,
        messages = limits.messages_per_round_max,
        updates = limits.updates_per_round_max,
        write_timeout = time(limits.write_timeout),
        rounds_kept = limits.rounds_kept,
        records_kept = limits.records_kept,
        quarantined = quarantine.enabled,
        enter_below = real(quarantine.enter_below),
        leave_at = real(quarantine.leave_at),
        fleet = settings.fleet.enabled,
        fleet_share = settings.fleet.share,
        lease_ttl = time(settings.fleet.lease_ttl),
        state_age = time(settings.fleet.state_age),
        optimizer = optimizer.name,
        rate = real(optimizer.rate),
        momentum = real(optimizer.momentum),
        second_momentum = real(optimizer.second_momentum),
        adaptivity = real(optimizer.adaptivity),
        floor_unit = or_comment("unit", floor.unit.map(floor_word).map(text), "\"block\""),
        block_min = or_comment("block_min", floor.block_min.map(time), "\"1h\""),
        epsilon_max = or_comment("epsilon_max", floor.epsilon_max.map(real), "4.0"),
        delta_max = or_comment("delta_max", floor.delta_max.map(real), "1e-6"),
        period_min = or_comment(
            "period_min",
            floor.period_min.map(|period| text(period.word())),
            "\"rolling\"",
        ),
        floor_sigma = or_comment(
            "noise_multiplier_min",
            floor.noise_multiplier_min.map(real),
            "0.7",
        ),
        signers = or_comment(
            "signers",
            (!floor.signers.is_empty()).then(|| {
                let keys: Vec<String> = floor.signers.iter().map(|key| text(key)).collect();
                format!("[{}]", keys.join(", "))
            }),
            "[\"thpk1_...\"]",
        ),
        signed = floor.signed,
        ledger_continuity = floor.ledger_continuity,
        central = central.enabled,
        central_version = central.version,
        central_epsilon = real(central.epsilon),
        central_delta = real(central.delta),
        central_sigma = real(central.noise_multiplier),
        central_rate = real(central.sampling_rate),
        central_clip = or_comment("clip_norm", central.clip_norm.map(real), "1.0"),
        central_sites = or_comment("sites", central.sites.map(|n| n.to_string()), "10000"),
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
        changed.rounds.updates_max = Some(99);
        changed.rounds.late_updates = Some(false);
        changed.rounds.site_average = Some(0.5);
        changed.rounds.accumulate = Some(false);
        changed.rounds.moments_keep = 12;
        changed.rounds.moments_age = Duration::from_hours(48);
        changed.rounds.validators = vec!["canary-1".into(), "canary-2".into()];
        changed.rounds.validation_missing = Missing::Publish;
        changed.rounds.kind = RoundKind::Delta;
        changed.model.dimension = Some(10);
        changed.quarantine.enabled = false;
        changed.fleet.enabled = true;
        changed.fleet.share = 10;
        changed.server_optimizer.name = crate::server_optimizer::OptimizerName::FedYogi;
        changed.privacy_floor = crate::floor::FloorSettings {
            unit: Some(FloorUnit::Block),
            block_min: Some(Duration::from_hours(1)),
            epsilon_max: Some(4.0),
            delta_max: Some(1e-6),
            period_min: Some(crate::floor::FloorPeriod::Year),
            noise_multiplier_min: Some(0.7),
            signed: true,
            signers: vec![format!("thpk1_{}", "ab".repeat(32))],
            ledger_continuity: true,
        };
        changed.central_noise.enabled = true;
        changed.central_noise.clip_norm = Some(2.5);
        changed.central_noise.sites = Some(12);
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
