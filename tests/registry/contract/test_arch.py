"""Names of architectures."""

import pytest

from registry.contract import ContractError, check_arch


@pytest.mark.parametrize("arch", ["sm_120a", "sm_120f", "sm_9", "SM_120", "sm_120\n", "sm_1200", "", None, 120])
def test_other_architecture_names_are_refused(arch):
    with pytest.raises(ContractError):
        check_arch(arch)
