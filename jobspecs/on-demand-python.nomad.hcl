# Slots on demand of the provider `python`. A shim dispatches this job for a run that finds
# no idle warm slot. Without this job, such a run waits for a warm slot.
#   nomad job run jobspecs/on-demand-python.nomad.hcl

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "Where the slots may be."
}

variable "image" {
  type        = string
  default     = "polydev-python-sandbox:latest"
  description = "Image of the slots; pin it by version or digest in production."
}

variable "egress" {
  type        = list(string)
  default     = []
  description = "What scripts may reach: a list of hosts, or `internet`; `[]` for nothing."
}

job "polydev-on-demand-python" {
  type        = "batch"
  priority    = 50
  datacenters = var.datacenters

  # Nomad receives only the id of the run.
  parameterized {
    payload       = "forbidden"
    meta_required = ["run_id"]
  }

  meta {
    provider = "python"
    purpose  = "on-demand"
  }

  group "slot" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "runtime" {
      driver       = "polydev"
      kill_timeout = "30s"
      kill_signal  = "SIGTERM"

      config {
        slot {
          provider = "python"
          image    = var.image
          run_id   = "${NOMAD_META_run_id}"

          egress {
            allow = var.egress
          }
        }
      }

      # What the run may use: the same as the driver's `python_class`.
      resources {
        cpu    = 2000
        memory = 2048
      }

      # The output of the run goes to its caller, so Nomad need not collect logs.
      logs {
        disabled = true
      }
    }
  }
}
