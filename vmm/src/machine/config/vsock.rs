//! A VM's sockets to the host.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::virtio::Cid;
use devices::virtio::vsock::CidError;
use serde::{Deserialize, Serialize};

/// Sockets between guest and host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address.
    #[cfg_attr(test, schemars(with = "super::schema::GuestCid"))]
    pub cid: Cid,
    /// The host's UNIX socket: programs of the host connect to it; for port P of the host, the guest reaches who listens at this path with
    /// `_P` behind it.
    pub socket: PathBuf,
}

/// A description that cannot be read, or of sockets that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VsockConfigError {
    /// Neither.
    #[error("--vsock '{0}': write CID:/path/of/the/socket, as in 3:/run/web.vsock")]
    Form(String),
    /// No guest's address.
    #[error("--vsock: {0}")]
    Cid(#[from] CidError),
    /// A path that no socket can have.
    #[error("--vsock {0}: a socket's path is absolute and has at most {PATH_MAX} bytes")]
    Path(PathBuf),
}

/// As the system has it (108 with a zero at the end), less a blank and the longest port.
const PATH_MAX: usize = 96;

impl VsockConfig {
    /// Checks it.
    ///
    /// # Errors
    /// [`VsockConfigError::Path`].
    pub fn validate(&self) -> Result<(), VsockConfigError> {
        let bytes = self.socket.as_os_str().as_bytes();
        let valid = self.socket.is_absolute() && bytes.len() <= PATH_MAX && !bytes.contains(&0);
        if valid { Ok(()) } else { Err(VsockConfigError::Path(self.socket.clone())) }
    }
}

impl FromStr for VsockConfig {
    type Err = VsockConfigError;

    fn from_str(text: &str) -> Result<Self, VsockConfigError> {
        let form = || VsockConfigError::Form(text.to_owned());
        let (cid, path) = text.split_once(':').filter(|(_, path)| !path.is_empty()).ok_or_else(form)?;
        let socket = std::path::absolute(path).map_err(|_| form())?;
        let config = Self { cid: cid.parse()?, socket };
        config.validate()?;
        Ok(config)
    }
}

impl fmt::Display for VsockConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.cid, self.socket.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_and_written_back() {
        assert_eq!("3:/run/web.vsock".parse::<VsockConfig>().unwrap().to_string(), "3:/run/web.vsock");
        assert!("3:web.vsock".parse::<VsockConfig>().unwrap().socket.is_absolute());
        let config: VsockConfig = serde_json::from_str(r#"{"cid":3,"socket":"/a"}"#).unwrap();
        assert_eq!(serde_json::to_string(&config).unwrap(), r#"{"cid":3,"socket":"/a"}"#);
    }

    #[test]
    fn what_are_none_are_refused_with_their_reason() {
        let long = format!("3:/{}", "x".repeat(96));
        for (text, reason) in [
            ("/run/x", "CID:/path"),
            ("3", "CID:/path"),
            ("3:", "CID:/path"),
            ("2:/x", "CID: take"),
            ("x:/x", "CID"),
            (&long, "96 bytes"),
        ] {
            let error = text.parse::<VsockConfig>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(serde_json::from_str::<VsockConfig>(r#"{"cid":2,"socket":"/a"}"#).is_err());
    }
}
