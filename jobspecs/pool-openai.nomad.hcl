# The warm pool of the provider `openai`. `count` is the size of the pool.
#   nomad job run jobspecs/pool-openai.nomad.hcl
#   nomad job scale polydev-pool-openai pool 20

variable "count" {
  type        = number
  default     = 10
  description = "Warm slots to keep."
}

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "Where the slots may be."
}

variable "image" {
  type        = string
  default     = "polydev-openai-runtime:latest"
  description = "Image of the slots; pin it by version or digest in production."
}

variable "prepare_ahead" {
  type        = bool
  default     = false
  description = "Whether a slot's next container is made during the run in the current one."
}

variable "agent" {
  type        = bool
  default     = true
  description = "Whether the CLI is started in every idle slot, and waits there for a prompt."
}

variable "tool_policy" {
  type        = bool
  default     = false
  description = "Let each call of a tool of the model wait for a decision of the shims' --policy. Runs are prompts then."
}

variable "base_url" {
  type        = string
  default     = ""
  description = "Where model requests go, in place of the provider's own API."
}

variable "egress" {
  type        = list(string)
  default     = ["internet"]
  description = "What the slots may reach beside their model: `internet`, or a list of hosts; `[]` for nothing."
}

job "polydev-pool-openai" {
  type        = "service"
  priority    = 40
  datacenters = var.datacenters

  meta {
    provider = "openai"
    purpose  = "warm-pool"
  }

  # Nomad starts the replacement of a slot only after the slot has ended. A slot with a
  # run in it ends when the run ends. Canaries do not wait for a predecessor. The job has
  # as many canaries as the pool has slots, and Nomad promotes them when they are warm.
  # So the pool is never empty during an update.
  update {
    max_parallel      = max(var.count, 1)
    canary            = max(var.count, 1)
    auto_promote      = true
    health_check      = "task_states"
    min_healthy_time  = "1s"
    healthy_deadline  = "10m"
    progress_deadline = "25h" # Longer than the longest run, 24 hours.
  }

  group "pool" {
    count = var.count

    # `nomad job scale` has the same limits as `polydev-shim pool scale`.
    scaling {
      min = 0
      max = 100
    }

    # When a node is drained, Nomad moves several slots at a time, but far fewer than a
    # node has.
    migrate {
      max_parallel     = 5
      health_check     = "task_states"
      min_healthy_time = "1s"
      healthy_deadline = "10m"
    }

    restart {
      attempts = 3
      interval = "5m"
      delay    = "15s"
      mode     = "fail" # With "delay", Nomad would never place the slot on another node.
    }

    # The pool returns to its size, however often its nodes or drivers fail.
    reschedule {
      delay          = "30s"
      delay_function = "exponential"
      max_delay      = "2m"
      unlimited      = true
    }

    task "runtime" {
      driver       = "polydev"
      kill_timeout = "10s"
      kill_signal  = "SIGTERM"

      config {
        slot {
          provider      = "openai"
          image         = var.image
          prepare_ahead = var.prepare_ahead
          agent         = var.agent
          tool_policy   = var.tool_policy

          upstream {
            base_url = var.base_url
          }

          egress {
            allow = var.egress
          }
        }
      }

      # What an idle slot may use. A run in the slot gets the limits of the driver's
      # `run_class`.
      resources {
        cpu    = 100
        memory = 256
      }

      # The output of a run goes to its caller, so Nomad need not collect logs. Without
      # this setting the agent keeps a helper process for every slot.
      logs {
        disabled = true
      }
    }
  }
}
