//! The host and its services, once per tick, as rows of the feature profile.
//!
//! Whatever cannot be read is NaN in its own channels: a vanished process costs its features, never the tick. The
//! host is read through sysinfo, a service through procfs, and only what the profile needs is refreshed.

mod host;
mod service;

use std::time::Duration;

use theriac_model::feature::FeatureSchema;
use theriac_model::sample::Sample;

pub(crate) use service::descendants_of;

pub use host::{HostReading, HostSampler};
pub use service::{ProbeWindow, ServiceReading, ServiceSampler};

/// Lays one reading out in the order of `schema`. Channels that this edge does not measure, and those of a missing
/// reading, are NaN.
///
/// `service` is `None` on a host without a supervised service or when its process is gone.
pub fn row(
    schema: &FeatureSchema,
    at_ms: u64,
    host: &HostReading,
    service: Option<&ServiceReading>,
    probe: &ProbeWindow,
) -> Sample {
    let value = |name: &str| match name {
        "host_cpu_used" => host.cpu_used,
        "host_load_per_core" => host.load_per_core,
        "host_memory_used" => host.memory_used,
        "host_swap_used" => host.swap_used,
        "host_disk_read" => host.disk_read,
        "host_disk_write" => host.disk_write,
        "host_network_receive" => host.network_receive,
        "host_network_send" => host.network_send,
        "service_probe_latency" => probe.latency_ms(),
        "service_probe_errors" => probe.error_ratio(),
        other => service.map_or(f64::NAN, |service| match other {
            "service_cpu" => service.cpu_cores,
            "service_memory" => service.memory_bytes,
            "service_threads" => service.threads,
            "service_file_descriptors" => service.file_descriptors,
            "service_disk_read" => service.disk_read,
            "service_disk_write" => service.disk_write,
            _ => f64::NAN,
        }),
    };
    // The model computes in f32; seven digits are more than any of these metrics has.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "f64 to f32 rounds, and an overflow becomes infinite: missing"
    )]
    let values = schema
        .features
        .iter()
        .map(|feature| value(&feature.name) as f32)
        .collect();
    Sample { at_ms, values }
}

/// Amount per second between two readings of a counter; NaN when it ran backwards (it was reset) or no time passed.
fn rate(now: u64, before: u64, elapsed: Duration) -> f64 {
    match now.checked_sub(before) {
        Some(amount) if !elapsed.is_zero() => amount as f64 / elapsed.as_secs_f64(),
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_channel_of_the_profile_is_measured() {
        let schema = FeatureSchema::host_service_v1();
        let host = HostReading {
            cpu_used: 1.0,
            load_per_core: 1.0,
            memory_used: 1.0,
            swap_used: 1.0,
            disk_read: 1.0,
            disk_write: 1.0,
            network_receive: 1.0,
            network_send: 1.0,
        };
        let service = ServiceReading {
            cpu_cores: 1.0,
            memory_bytes: 1.0,
            threads: 1.0,
            file_descriptors: 1.0,
            file_descriptor_share: 1.0,
            disk_read: 1.0,
            disk_write: 1.0,
        };
        let mut probe = ProbeWindow::default();
        probe.record(true, Duration::from_millis(1));
        let sample = row(&schema, 7, &host, Some(&service), &probe);
        for (feature, value) in schema.features.iter().zip(&sample.values) {
            assert!(value.is_finite(), "{} is not measured", feature.name);
        }
        assert_eq!((sample.at_ms, sample.values.len()), (7, schema.channels()));
    }

    #[test]
    fn a_vanished_process_costs_its_channels_only() {
        let schema = FeatureSchema::host_service_v1();
        let host = HostSampler::new(std::path::Path::new("/"), Vec::new()).read(Duration::from_secs(1));
        let sample = row(&schema, 0, &host, None, &ProbeWindow::default());
        let missing = |name: &str| sample.values[schema.position(name).unwrap()].is_nan();
        assert!(missing("service_cpu") && missing("service_memory") && missing("service_probe_latency"));
        assert!(!missing("host_memory_used") && !missing("host_load_per_core"));
    }

    #[test]
    fn a_counter_that_was_reset_is_missing_and_not_huge() {
        assert!(rate(5, 10, Duration::from_secs(1)).is_nan());
        assert!(rate(5, 5, Duration::ZERO).is_nan());
        assert_eq!(rate(30, 10, Duration::from_secs(2)).to_bits(), 10.0_f64.to_bits());
    }
}
