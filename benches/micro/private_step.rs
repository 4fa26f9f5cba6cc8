//! A private step beside a plain one: medians of CPU time of one thread, the kinds taking turns, one JSON line for each network.
//!
//! `RAYON_NUM_THREADS=1 cargo bench -p theriac-benches --bench private_step`. CPU time, because other work on the machine does not count into it;
//! taking turns, because what slows one kind then slows all.

use std::error::Error;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use candle_core::{Device, Tensor};
use rustix::time::{ClockId, clock_gettime};
use theriac_benches::Numbers;
use theriac_model::global::GlobalModel;
use theriac_model::private_train::{DenseLayer, DenseNetwork, UnitGradients};
use theriac_privacy::descent::{NoisyDescent, UnitSum};
use theriac_privacy::factors::{LayerFactors, UnitFactors};
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::noise::{ExactGaussian, FixedNoise, NoiseMechanism, add_exact_noise};
use theriac_privacy::policy::Policy;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{L2Norm, NoiseMultiplier, Round, Timestamp};

/// Units of a step, each one row.
const BATCH: usize = 256;
/// Turns that are counted, after a tenth as many that are not.
const TURNS: usize = 200;

fn main() -> Result<(), Box<dyn Error>> {
    let asked = std::env::var("THERIAC_BENCH_TURNS").ok();
    let turns = match asked.and_then(|turns| turns.parse().ok()) {
        _ if std::env::args().any(|word| word == "--test") => 1,
        Some(turns) => turns,
        None => TURNS,
    };
    let mut numbers = Numbers::new(7);
    noise(turns)?;
    for (units, values) in [
        (20, 7_258),
        (64, 7_258),
        (64, 51_212),
        (256, 9_090),
        (64, 1_000_000),
    ] {
        let turns = if values > 100_000 {
            turns.min(10)
        } else {
            turns.min(100)
        };
        whole_numbers(units, values, turns, &mut numbers)?;
    }
    let linear = numbers.signed(38 * 190);
    let shipped = DenseNetwork::shipped(&GlobalModel::initial(38, 1), Some(&linear))?;
    steps(
        "shipped model, 38 channels",
        &shipped,
        (190, 38),
        turns,
        &mut numbers,
    )?;
    for width in [38, 380] {
        let network = autoencoder(width, &mut numbers)?;
        steps(
            &format!("autoencoder {width}-64-16-64-{width}"),
            &network,
            (width, width),
            turns,
            &mut numbers,
        )?;
    }
    Ok(())
}

/// The network that other libraries are measured on.
fn autoencoder(width: usize, numbers: &mut Numbers) -> Result<DenseNetwork, candle_core::Error> {
    let layers = [(width, 64), (64, 16), (16, 64), (64, width)].map(|(inputs, outputs)| {
        let weight = Tensor::from_vec(numbers.signed(inputs * outputs), (outputs, inputs), &Device::Cpu)?;
        Ok::<_, candle_core::Error>(DenseLayer {
            weight: (weight * 0.1)?,
            bias: Tensor::from_vec(numbers.signed(outputs), outputs, &Device::Cpu)?,
        })
    });
    DenseNetwork::new(layers.into_iter().collect::<Result<_, _>>()?, None)
}

fn noise(turns: usize) -> Result<(), Box<dyn Error>> {
    let mut values = vec![0_i64; 10_000];
    let mut times = Vec::new();
    for _ in 0..turns {
        times.push(timed(|| Ok(add_exact_noise(&mut values)?))?);
    }
    let nanoseconds = median(&mut times).as_secs_f64() * 1e9 / values.len() as f64;
    print(&format!("{{\"exact_noise_ns_per_value\": {nanoseconds:.1}}}"));
    Ok(())
}

/// A step of [`NoisyDescent`] to which gradients come as vectors: each unit clipped and cut to the grid in whole numbers, checked in 128 bits, added; noise; the mean. The
/// gradients are there already; their copies are not counted.
fn whole_numbers(units: u64, values: u32, turns: usize, numbers: &mut Numbers) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let mut descent = descent(&folder.path().join("l"), units, values, 1.0, turns + turns / 10)?;
    // One at a time, as a large model's gradients come; eight different ones.
    let gradients: Vec<Vec<f32>> = (0..8).map(|_| numbers.signed(values as usize)).collect();
    let mut times = Vec::new();
    while descent.left() > 0 {
        let add = |blocks: &[u64], sum: &mut UnitSum| {
            let units = blocks.iter().zip(gradients.iter().cycle());
            units.for_each(|(_, gradient)| sum.add(gradient));
        };
        times.push(timed(|| Ok(descent.step_each(&ExactGaussian, add)?))?);
    }
    let milliseconds = median(&mut times).as_secs_f64() * 1e3;
    let per_value = milliseconds * 1e6 / units as f64 / f64::from(values);
    print(&format!(
        "{{\"whole_number_step_units\": {units}, \"values\": {values}, \"step_ms\": {milliseconds:.3}, \"ns_per_unit_and_value\": {per_value:.2}}}"
    ));
    Ok(())
}

/// Charged steps on so many units.
fn descent(
    path: &Path,
    units: u64,
    values: u32,
    clip_norm: f64,
    steps: usize,
) -> Result<NoisyDescent, Box<dyn Error>> {
    let policy = Policy::parse("site = \"site-a\"\nepsilon = 100.0\n")?;
    let mut ledger = Ledger::open(path, policy.site(), policy.clone(), Timestamp(1))?;
    let plan = ReleasePlan {
        round: Round(1),
        nonce: 1,
        kind: UpdateKind::Moments,
        values,
        block_span: Duration::from_hours(1),
        blocks: (0..units).collect(),
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(clip_norm)?,
        noise_multiplier: NoiseMultiplier::new(1.28)?,
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(1))? else {
        return Err("charged before".into());
    };
    let steps = NonZeroU32::new(u32::try_from(steps)?).ok_or("no turns")?;
    Ok(NoisyDescent::new(reservation, steps)?)
}

/// Turns of a plain step and of steps of [`NoisyDescent`] on the same rows: forward and backward pass, clipped in whole numbers ([`theriac_privacy::factors`]), without
/// noise, with it, and on blocks of 16 rows; each with the move of the weights.
fn steps(
    name: &str,
    network: &DenseNetwork,
    (inputs, outputs): (usize, usize),
    turns: usize,
    numbers: &mut Numbers,
) -> Result<(), Box<dyn Error>> {
    const RATE: f64 = 1e-6;
    let input = Tensor::from_vec(numbers.signed(BATCH * inputs), (BATCH, inputs), &Device::Cpu)?;
    let target = Tensor::from_vec(numbers.signed(BATCH * outputs), (BATCH, outputs), &Device::Cpu)?;
    let gradients = |rows: usize| UnitGradients::new(network.trace(&input, &target)?, rows);
    let norms = gradients(1)?.norms()?;
    // About half of the units are clipped.
    let clip = f64::from(norms.iter().sum::<f32>() / norms.len() as f32);
    let (warm, values) = (turns / 10, u32::try_from(network.parameters())?);
    let folder = tempfile::tempdir()?;
    let descent = |name: &str, units: u64, clip: f64| {
        descent(&folder.path().join(name), units, values, clip, turns + warm)
    };
    let units = BATCH as u64;
    let mut private = descent("private", units, clip)?;
    let mut noised = descent("noised", units, clip)?;
    let mut blocks = descent("blocks", units / 16, 16.0 * clip)?;
    let step = |descent: &mut NoisyDescent, noise: &dyn NoiseMechanism, rows: usize| {
        timed(|| {
            let gradients = gradients(rows)?;
            let mut added = Ok(());
            let mean = descent.step_each(noise, |_, sum| added = add(&gradients, sum))?;
            added?;
            Ok(network.step(&mean, RATE)?)
        })
    };
    let mut times: [Vec<Duration>; 4] = Default::default();
    for turn in 0..turns + warm {
        let taken = [
            timed(|| Ok(network.step(&mean(&gradients(1)?.sum()?), RATE)?))?,
            step(&mut private, &FixedNoise(0.0), 1)?,
            step(&mut noised, &ExactGaussian, 1)?,
            step(&mut blocks, &FixedNoise(0.0), 16)?,
        ];
        if turn >= warm {
            times
                .iter_mut()
                .zip(taken)
                .for_each(|(times, taken)| times.push(taken));
        }
    }
    let [plain, private, noisy, blocks] = times.map(|mut times| median(&mut times).as_secs_f64() * 1e3);
    print(&format!(
        "{{\"network\": \"{name}\", \"parameters\": {}, \"plain_ms\": {plain:.3}, \"private_ms\": {private:.3}, \
         \"noised_ms\": {noisy:.3}, \"blocks_of_16_ms\": {blocks:.3}, \"private_ratio\": {:.2}, \"noised_ratio\": {:.2}}}",
        network.parameters(),
        private / plain,
        noisy / plain
    ));
    Ok(())
}

/// Gives the units of a pass to the sum.
fn add(gradients: &UnitGradients, sum: &mut UnitSum) -> Result<(), Box<dyn Error>> {
    gradients.with_factors(|layers| {
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| LayerFactors {
                inputs: layer.inputs,
                errors: layer.errors,
                bias: layer.bias,
                range_log2: layer.range_log2,
            })
            .collect();
        sum.add_factors(&UnitFactors::new(&layers, gradients.units(), gradients.rows())?);
        Ok(())
    })?
}

fn mean(sum: &[f32]) -> Vec<f32> {
    sum.iter().map(|x| x / BATCH as f32).collect()
}

fn timed<T>(work: impl FnOnce() -> Result<T, Box<dyn Error>>) -> Result<Duration, Box<dyn Error>> {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(
            u64::try_from(time.tv_sec).unwrap_or(0),
            u32::try_from(time.tv_nsec).unwrap_or(0),
        )
    };
    let start = now();
    let done = work()?;
    let taken = now().saturating_sub(start);
    drop(done);
    Ok(taken)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[expect(clippy::print_stdout, reason = "the result of this program")]
fn print(line: &str) {
    println!("{line}");
}
