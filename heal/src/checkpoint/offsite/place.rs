//! Which store an address names, and how it is reached.

use std::path::Path;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;

use super::OffsiteError;

/// Whether this build knows the kind of store that `url` names.
///
/// # Errors
/// [`OffsiteError::Url`].
pub fn check_url(url: &str) -> Result<(), OffsiteError> {
    let wrong = |what: &str| {
        Err(OffsiteError::Url {
            url: url.to_owned(),
            what: what.to_owned(),
        })
    };
    match url.split_once("://") {
        Some(("file", path)) if Path::new(path).is_absolute() => Ok(()),
        Some(("file", _)) => wrong("is no absolute path: write file:///DIRECTORY"),
        Some(("s3", _)) if cfg!(not(feature = "s3")) => wrong("needs a build with the feature `s3`"),
        Some(("s3", rest)) if rest.is_empty() || rest.starts_with('/') => {
            wrong("needs a bucket: write s3://BUCKET/PREFIX")
        }
        Some(("s3", _)) => Ok(()),
        _ => wrong("is neither file:///DIRECTORY nor s3://BUCKET/PREFIX"),
    }
}

/// The store and the prefix of its objects' names. `variables` as in the environment: name, value.
pub(super) fn open_store(
    url: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<(Arc<dyn ObjectStore>, String), OffsiteError> {
    check_url(url)?;
    let unreachable = |source| OffsiteError::Unreachable {
        url: url.to_owned(),
        source,
    };
    if let Some(dir) = url.strip_prefix("file://") {
        let store = LocalFileSystem::new_with_prefix(dir).map_err(unreachable)?;
        return Ok((Arc::new(store.with_fsync(true)), String::new()));
    }
    #[cfg(feature = "s3")]
    if let Some(rest) = url.strip_prefix("s3://") {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let store = s3(bucket, variables).build().map_err(unreachable)?;
        return Ok((Arc::new(store), prefix.to_owned()));
    }
    #[cfg(not(feature = "s3"))]
    drop(variables);
    Err(OffsiteError::Url {
        url: url.to_owned(),
        what: "is of no kind that this build knows".to_owned(),
    })
}

/// As `AmazonS3Builder::from_env`, from any variables.
#[cfg(feature = "s3")]
fn s3(
    bucket: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> object_store::aws::AmazonS3Builder {
    let settings = variables.into_iter().filter_map(|(name, value)| {
        let name = name.starts_with("AWS_").then(|| name.to_ascii_lowercase())?;
        Some((name.parse().ok()?, value))
    });
    // One place decides how often a request is made: ours, which tells what it does.
    let once = object_store::RetryConfig {
        max_retries: 0,
        ..object_store::RetryConfig::default()
    };
    settings
        .fold(
            object_store::aws::AmazonS3Builder::new(),
            |builder, (key, value)| builder.with_config(key, value),
        )
        .with_retry(once)
        .with_bucket_name(bucket)
}
