# SPDX-License-Identifier: Apache-2.0
"""The embedded server: a packed checkpoint behind the OpenAI API, without a GPU or Paddle."""
