"""What somebody reads who follows a process's first call from `flash_attn` to cuLaunchKernel."""

from tests.support import cold_call


def test_a_first_call_runs_through_few_files():
    trace = cold_call.of_toys()
    assert trace.frames[0] == ("runtime/api/attention.py", "flash_attn")
    assert trace.frames[-1][0] == "runtime/call/plan.py"
    assert len(trace.files) <= 14, "\n".join(trace.files)
    assert trace.moves <= 25, "\n".join(f"{file}: {', '.join(functions)}" for file, functions in trace.runs())
