// One member of the MDSCM family on a GPU, from clips to probabilities.
#pragma once

#include "engine/cuda/model.h"
#include "engine/cuda/program.h"
#include "engine/cuda/stages.h"
#include "engine/network.h"
#include "engine/packer.h"

namespace avser::gpu {

class GpuMdscm final : public GpuModel {
 public:
  // Tensors are copied.
  GpuMdscm(const Network& network, const Tensors& tensors, const GpuOptions& options);

  bool voice() const override { return network_.voice; }
  std::vector<GpuStage> stages() const override { return mdscm_stages(network_, options_.precision); }
  Plan plan(int64_t clips) const override;

 private:
  class Builder;

  // The convolutions go clip by clip through the same maps.
  int first_of_group() const override { return program_.convolution_steps(); }
  void launch(const Plan& plan, const Run& run, int begin, int end, Stream stream) const override;

  int64_t tile_bytes(int rows) const;
  int tile_rows(int rows) const;
  int64_t convolution_bytes() const;
  int64_t encoder_bytes(int rows) const;
  int64_t least_shared_bytes() const;
  int64_t put_on_chip(Program& program, int team) const;
  int64_t tiles_bytes(const Schedule& schedule) const;
  int stream_offset(const Schedule& schedule) const;
  Program place(const Schedule& schedule) const;

  const Network network_;
  const int element_;  // bytes
  Program program_{};
};

}  // namespace avser::gpu
