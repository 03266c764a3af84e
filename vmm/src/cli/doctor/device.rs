//! `/dev/kvm`: is it there, may we, what does it say that it can.

use serde::Serialize;

use crate::machine::kvm::host::Capability;
use crate::machine::kvm::{Host, KvmError};

/// What there is to say of `/dev/kvm`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Device {
    pub(super) present: bool,
    pub(super) permitted: bool,
    /// 12, as of every Linux since 2.6.22; none where it could not be asked.
    pub(super) api_version: Option<i32>,
    pub(super) capabilities: Vec<Capability>,
    pub(super) max_vcpus: Option<usize>,
    pub(super) max_memory_slots: Option<usize>,
    /// Why perdure cannot use it, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// Opens it.
pub(super) fn look() -> Device {
    let opened = Host::open_unchecked();
    let version = api_version(opened.as_ref().err());
    let (present, permitted) = reach(opened.as_ref().err());
    match opened {
        Ok(host) => {
            let capabilities = host.capabilities();
            let error = missing(&capabilities).map(|name| KvmError::Capability(name).to_string());
            let (vcpus, slots) = (host.max_vcpus(), host.max_memory_slots());
            let (max_vcpus, max_memory_slots) = (Some(vcpus), Some(slots));
            Device { present, permitted, api_version: version, capabilities, max_vcpus, max_memory_slots, error }
        }
        Err(error) => Device {
            present,
            permitted,
            api_version: version,
            capabilities: Vec::new(),
            max_vcpus: None,
            max_memory_slots: None,
            error: Some(super::super::one_line(&error.into())),
        },
    }
}

/// `open_unchecked` accepts one version alone, and names any other.
fn api_version(error: Option<&KvmError>) -> Option<i32> {
    match error {
        None => Some(12),
        Some(KvmError::ApiVersion(version)) => Some(*version),
        Some(_) => None,
    }
}

/// Whether it is there, and whether we may open it. That the file is there proves nothing: without its module, opening
/// it fails as if it were not.
fn reach(error: Option<&KvmError>) -> (bool, bool) {
    match error {
        Some(KvmError::Missing) => (false, false),
        Some(KvmError::Permission | KvmError::Open(_)) => (true, false),
        _ => (true, true),
    }
}

fn missing(capabilities: &[Capability]) -> Option<&'static str> {
    capabilities.iter().find(|capability| capability.needed && capability.value <= 0).map(|capability| capability.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_forbidden_and_foreign_are_told_apart() {
        assert_eq!(reach(None), (true, true));
        assert_eq!(reach(Some(&KvmError::Missing)), (false, false));
        assert_eq!(reach(Some(&KvmError::Permission)), (true, false));
        assert_eq!(reach(Some(&KvmError::ApiVersion(11))), (true, true));
        assert_eq!(api_version(Some(&KvmError::ApiVersion(11))), Some(11));
        assert_eq!(api_version(Some(&KvmError::Permission)), None);
    }

    #[test]
    fn only_what_is_needed_can_be_missing() {
        let capability = |name, value, needed| Capability { name, value, needed };
        assert_eq!(missing(&[capability("A", 1, true), capability("B", 0, false)]), None);
        assert_eq!(missing(&[capability("A", 1, true), capability("C", 0, true)]), Some("C"));
    }
}
