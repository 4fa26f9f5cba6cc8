//! A private step beside a plain one: medians of CPU time of one thread, the kinds taking turns, one JSON line for each network.
//!
//! `RAYON_NUM_THREADS=1 cargo bench -p theriac-benches --bench private_step`. CPU time, because other work on the machine does not count into it;
//! taking turns, because what slows one kind then slows all.

use std::error::Error;
use std::num::NonZeroU32;
use std::time::Duration;

use candle_core::{Device, Tensor};
use rustix::time::{ClockId, clock_gettime};
use theriac_benches::Numbers;
use theriac_model::global::GlobalModel;
use theriac_model::private_train::{DenseLayer, DenseNetwork, UnitGradients};
use theriac_privacy::descent::{NoisyDescent, UnitSum};
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::noise::{ExactGaussian, add_exact_noise};
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

/// A step of [`NoisyDescent`]: each unit clipped and cut to the grid in whole numbers, checked in 128 bits, added; noise; the mean. The gradients are there
/// already; their copies are not counted.
fn whole_numbers(units: u64, values: u32, turns: usize, numbers: &mut Numbers) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let policy = Policy::parse("site = \"site-a\"\nepsilon = 100.0\n")?;
    let mut ledger = Ledger::open(
        &folder.path().join("l"),
        policy.site(),
        policy.clone(),
        Timestamp(1),
    )?;
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
        clip_norm: L2Norm::new(1.0)?,
        noise_multiplier: NoiseMultiplier::new(1.28)?,
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(1))? else {
        return Err("charged before".into());
    };
    let steps = NonZeroU32::new(u32::try_from(turns + turns / 10)?).ok_or("no turns")?;
    let mut descent = NoisyDescent::new(reservation, steps)?;
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
    let clip = norms.iter().sum::<f32>() / norms.len() as f32;
    let mut times: [Vec<Duration>; 4] = Default::default();
    for turn in 0..turns + turns / 10 {
        let taken = [
            timed(|| Ok(network.step(&mean(&gradients(1)?.sum()?), RATE)?))?,
            timed(|| Ok(network.step(&mean(&gradients(1)?.clipped_sum(clip)?.sum), RATE)?))?,
            timed(|| Ok(network.step(&noised(&gradients(1)?.clipped_sum(clip)?.sum, clip)?, RATE)?))?,
            timed(|| Ok(network.step(&mean(&gradients(16)?.clipped_sum(16.0 * clip)?.sum), RATE)?))?,
        ];
        if turn >= turns / 10 {
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

fn mean(sum: &[f32]) -> Vec<f32> {
    sum.iter().map(|x| x / BATCH as f32).collect()
}

/// The book-kept sum of floats on the grid of σ = 1, with exact noise, divided by the batch: the arithmetic of a private step as other libraries make it. **No
/// charge covers it** (`docs/privacy.md`, private training, says why); what the ledger charges for is timed by [`whole_numbers`].
fn noised(sum: &[f32], clip_norm: f32) -> Result<Vec<f32>, Box<dyn Error>> {
    let step = f64::from(clip_norm) / 1_048_576.0;
    #[expect(clippy::cast_possible_truncation, reason = "cut to the grid")]
    let mut steps: Vec<i64> = sum.iter().map(|x| (f64::from(*x) / step) as i64).collect();
    add_exact_noise(&mut steps)?;
    let scale = step / BATCH as f64;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "noised values in single precision"
    )]
    let mean = steps.into_iter().map(|x| (x as f64 * scale) as f32).collect();
    Ok(mean)
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
