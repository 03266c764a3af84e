//! What a VM is made of, as its context has it; changed for a start, and changed back if that fails.

use super::super::context::{ContextV1, Encoded};
use super::{RegionsError, VmRegions};
use crate::machine::config::VmConfig;

impl VmRegions {
    /// What the VM is made of.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.context.config
    }

    /// Changes what the VM is made of, from its next start on. The sizes of regions do not change.
    pub fn set_config(&mut self, config: VmConfig) {
        self.before = Some(std::mem::replace(&mut self.context.config, config));
    }

    /// The fresh start failed: the VM is made of what it was before.
    pub fn revert_config(&mut self) {
        if let Some(before) = self.before.take() {
            self.context.config = before;
        }
    }

    /// Writes down what the VM is made of if that was changed, for a VM that is cut off before its next freeze and goes back to a generation: the
    /// newest context has it, whose RAM is no longer there. So RAM must not be stamped by now.
    ///
    /// # Errors
    /// [`RegionsError::Context`]: the newest context is the one before, or unknown.
    pub fn record_config(&mut self) -> Result<(), RegionsError> {
        if self.before.is_none() {
            return Ok(());
        }
        let context = ContextV1 { sequence: self.next_sequence(), ..self.context.clone() };
        self.write_context(&Encoded::new(&context)?)?;
        self.before = None;
        Ok(())
    }
}
