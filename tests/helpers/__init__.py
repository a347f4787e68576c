# SPDX-License-Identifier: Apache-2.0
"""What several test files share: made-up models, stand-ins, references, and runs to compare."""
