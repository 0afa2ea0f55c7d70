// SPDX-License-Identifier: Apache-2.0
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <toppings/image_file.h>
#include <unistd.h>

#include <cmath>
#include <functional>
#include <limits>
#include <thread>

#include "image/crc32c.h"
#include "image_file_testing.h"

// What a file claims must not decide how much is allocated.
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=64"; }

namespace toppings {
namespace {

using testing::Bytes;
using testing::bytes_of;
using testing::expect_equal;
using testing::layout_of_bytes;
using testing::Ranks;
using testing::small_shape;
using testing::TemporaryFolder;
using testing::write_bytes;

constexpr std::int64_t kBudget = 1 << 22;
const Ranks kRanks{{3, 0}, {}, {5}};

std::shared_ptr<const Image> small_image(HostStore& store, DType dtype = DType::bf16,
                                         const std::string& digest = "sha") {
  return testing::add_image(store, AdapterLayout(small_shape(), dtype, kRanks), digest);
}

// A valid file of a small image.
Bytes small_file() {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  write_image(*small_image(store), folder / "a");
  return bytes_of(folder / "a");
}

template <class T>
T number_at(const Bytes& bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

template <class T>
void put(Bytes& bytes, std::size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
}

// As one who wants to deceive would.
void sign(Bytes& bytes) {
  const auto end = number_at<std::uint32_t>(bytes, 12);
  if (end < 52 || end > bytes.size()) return;
  put(bytes, end - 4, crc32c(0, bytes.data(), end - 4));
}

class EveryDType : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, EveryDType, ::testing::Values(DType::f32, DType::f16, DType::bf16));

TEST_P(EveryDType, AnImageComesBackAsItWas) {
  const TemporaryFolder folder;
  const std::string path = folder / "a.toppings";
  HostStore store(host_device(), kBudget);
  const auto image = small_image(store, GetParam());
  write_image(*image, path);
  EXPECT_EQ(folder.num_files(), 1U);

  const ImageFileHeader header = read_image_header(path);
  EXPECT_EQ(header.digest, "sha");
  EXPECT_EQ(header.layout, image->layout());
  EXPECT_EQ(header.scales, (std::vector<float>{3.5F, 0, 5.5F}));

  HostStore other(host_device(), kBudget);
  ReadProgress progress;
  const auto again = read_image(other, path, nullptr, {}, &progress);
  expect_equal(*image, *again);
  EXPECT_EQ(progress.bytes_total, image->layout().bytes());
  EXPECT_EQ(progress.bytes_read, image->layout().bytes());
  EXPECT_EQ(other.find("sha"), again);
  EXPECT_EQ(other.stats().used_bytes, image->layout().bytes());
}

TEST(ImageFile, ScalesComeBackExactly) {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  for (const float scale : {0.1F, -1.0F / 3, std::numeric_limits<float>::denorm_min(),
                            std::numeric_limits<float>::max(), 0.0F}) {
    ImageBuilder builder = store.build(layout_of_bytes(64), "a");
    const std::vector<float> values(8, 1);
    builder.set(0, 0, values.data(), values.data(), DType::f32, scale);
    write_image(*store.insert(std::move(builder)), folder / "a");
    store.erase("a");
    EXPECT_EQ(read_image(store, folder / "a")->scale(0, 0), scale);
    store.erase("a");
  }
}

// docs/image_format.md, field by field.
TEST(ImageFile, HasTheBytesTheFormatSays) {
  const Bytes bytes = small_file();
  EXPECT_EQ(std::string(bytes.data(), 8), "\x89TPG\r\n\x1A\n");
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 8), 1U);
  const auto header_bytes = number_at<std::uint32_t>(bytes, 12);
  EXPECT_EQ(header_bytes, 48U + 3 + 3 * 16 + 3 * 20 + 3 + 4);
  EXPECT_EQ(number_at<std::uint64_t>(bytes, 16), bytes.size());
  EXPECT_EQ(bytes.size(), 4096U + 384 + 640);
  EXPECT_EQ(number_at<std::uint64_t>(bytes, 24), 4096U);
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 32), 2U);  // bf16
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 36), 3U);
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 40), 3U);
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 44), 0U);
  EXPECT_EQ(std::string(bytes.data() + 48, 3), "sha");
  EXPECT_EQ(number_at<std::uint64_t>(bytes, 51), 384U);  // layer 0
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 59), crc32c(0, bytes.data() + 4096, 384));
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 63), 2U);
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 67), 24U);  // q
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 71), 40U);
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 75), 3U);
  EXPECT_EQ(number_at<float>(bytes, 79), 3.5F);
  EXPECT_EQ(number_at<std::uint32_t>(bytes, 83), 1U);
  EXPECT_EQ(bytes[87], 'q');
  EXPECT_EQ(number_at<std::uint32_t>(bytes, header_bytes - 4),
            crc32c(0, bytes.data(), header_bytes - 4));
}

TEST(ImageFile, ReadsLayersLargerAndSmallerThanAPiece) {
  const TemporaryFolder folder;
  std::vector<std::vector<Projection>> layers;
  Ranks ranks;
  for (int i = 0; i < 40; ++i) {
    layers.push_back({{"p", 64, 64}});
    ranks.push_back({i % 7 == 0 ? 9'000 : i % 3 == 0 ? 0 : i});
  }
  const auto shape = std::make_shared<const ModelShape>(layers);
  const AdapterLayout layout(shape, DType::f16, ranks);
  HostStore store(host_device(), 2 * layout.bytes());
  const auto image = testing::add_image(store, layout, "a");
  write_image(*image, folder / "a");
  HostStore other(host_device(), 2 * layout.bytes());
  expect_equal(*image, *read_image(other, folder / "a"));
}

TEST(ImageFile, UsesTheCallersShape) {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  write_image(*small_image(store), folder / "a");
  store.erase("sha");
  const auto shape = small_shape();
  EXPECT_EQ(read_image(store, folder / "a", shape)->layout().shape(), shape);
  const auto other = std::make_shared<const ModelShape>(
      std::vector<std::vector<Projection>>{{{"q", 24, 40}, {"k", 24, 9}}, {}, {{"o", 40, 24}}});
  TOPPINGS_EXPECT_ERROR(read_image(store, folder / "a", other), mismatch);
}

TEST(ImageFile, FindsWhatIsThereAlready) {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  const auto image = small_image(store);
  write_image(*image, folder / "a");
  EXPECT_EQ(read_image(store, folder / "a"), image);
  HostStore halves(host_device(), kBudget);
  const auto half = small_image(halves, DType::f16);
  TOPPINGS_EXPECT_ERROR(read_image(halves, folder / "a"), invalid_argument);
  EXPECT_EQ(halves.find("sha"), half);
}

TEST(ImageFile, ReplacesAFileAsAWholeOrNotAtAll) {
  const TemporaryFolder folder;
  const std::string path = folder / "a";
  HostStore store(host_device(), kBudget);
  const auto first = small_image(store);
  write_image(*first, path);
  const Bytes before = bytes_of(path);
  const auto second = small_image(store, DType::f32, "other");
  const auto large = testing::add_image(store, layout_of_bytes(1 << 20), "large");

  signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const rlimit small{.rlim_cur = 64 * 1024, .rlim_max = limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  TOPPINGS_EXPECT_ERROR(write_image(*large, path), io);
  setrlimit(RLIMIT_FSIZE, &limit);
  EXPECT_EQ(bytes_of(path), before);
  EXPECT_EQ(folder.num_files(), 1U);

  write_image(*second, path);
  EXPECT_EQ(read_image_header(path).digest, "other");
  EXPECT_EQ(folder.num_files(), 1U);

  TOPPINGS_EXPECT_ERROR(write_image(*first, folder / "no/a"), io);
  std::filesystem::create_directories(folder / "taken/by");
  TOPPINGS_EXPECT_ERROR(write_image(*first, folder / "taken"), io);
  EXPECT_EQ(folder.num_files(), 2U);
}

TEST(ImageFile, RefusesToWriteWhatCannotBeReadBack) {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  TOPPINGS_EXPECT_ERROR(write_image(*small_image(store, DType::f32, "\xFF"), folder / "a"),
                        invalid_argument);
  TOPPINGS_EXPECT_ERROR(write_image(*small_image(store), folder / std::string("a\0b", 3)), io);
  EXPECT_EQ(folder.num_files(), 0U);
}

TEST(ImageFile, NeedsAFileThatCanBeRead) {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  for (const std::string& path : {folder / "absent", folder / "", folder / "pipe"}) {
    TOPPINGS_EXPECT_ERROR(read_image_header(path), io);
    TOPPINGS_EXPECT_ERROR(read_image(store, path), io);
  }
}

struct Damage {
  const char* what;
  std::function<void(Bytes&)> apply;
  Status status = Status::format;
};

TEST(ImageFile, RefusesDamage) {
  const std::uint32_t huge = 0xFFFFFFFF;
  const auto with = [](std::size_t offset, auto value) {
    return [=](Bytes& bytes) {
      put(bytes, offset, value);
      sign(bytes);
    };
  };
  const Damage cases[] = {
      {"empty", [](Bytes& bytes) { bytes.clear(); }},
      {"short", [](Bytes& bytes) { bytes.resize(20); }},
      {"other magic", [](Bytes& bytes) { bytes[0] = 'x'; }},
      {"line ends", [](Bytes& bytes) { bytes.erase(bytes.begin() + 4); }},
      {"version 2", with(8, 2U), Status::unsupported},
      {"version 0", with(8, 0U), Status::unsupported},
      {"header too short", with(12, 51U)},
      {"header beyond the file", with(12, huge)},
      {"header a byte longer", with(12, 167U)},
      {"file longer than it is", with(16, std::uint64_t{1} << 40)},
      {"other data offset", with(24, std::uint64_t{8192})},
      {"dtype 3", with(32, 3U)},
      {"no layers", with(36, 0U)},
      {"two layers", with(36, 2U)},
      {"endless layers", with(36, huge)},
      {"no digest", with(40, 0U)},
      {"endless digest", with(40, huge)},
      {"reserved", with(44, 1U)},
      {"digest no text", with(48, '\xC0')},
      {"another layer size", with(51, std::uint64_t{448})},
      {"endless projections", with(63, huge)},
      {"another width", with(67, 25U)},
      {"width 0", with(67, 0U)},
      {"width 2^31", with(71, 0x80000000U)},
      {"another rank", with(75, 4U)},
      {"endless rank", with(75, huge)},
      {"scale NaN", with(79, std::numeric_limits<float>::quiet_NaN())},
      {"scale infinite", with(79, std::numeric_limits<float>::infinity())},
      {"scale at rank 0", with(100, 1.0F)},
      {"no name", with(83, 0U)},
      {"endless name", with(83, huge)},
      {"the same name", with(108, 'q')},
      {"name no text", with(87, '\x80')},
      {"header's checksum", [](Bytes& bytes) { bytes[79] = '\1'; }},
      {"padding", [](Bytes& bytes) { bytes[4095] = 1; }},
      {"layer 0", [](Bytes& bytes) { bytes[4096 + 383] ^= 1; }},
      {"layer 2", [](Bytes& bytes) { bytes[4096 + 384] ^= 1; }},
      {"a byte less", [](Bytes& bytes) { bytes.pop_back(); }},
      {"a byte more", [](Bytes& bytes) { bytes.push_back(0); }},
      {"the last layer gone", [](Bytes& bytes) { bytes.resize(4096 + 384); }},
  };
  const TemporaryFolder folder;
  const Bytes valid = small_file();
  HostStore store(host_device(), kBudget);
  for (const Damage& damage : cases) {
    SCOPED_TRACE(damage.what);
    Bytes bytes = valid;
    damage.apply(bytes);
    ASSERT_NE(bytes, valid);
    write_bytes(folder / "a", bytes);
    try {
      read_image(store, folder / "a");
      ADD_FAILURE() << "expected an error, got none";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), damage.status) << error.what();
      EXPECT_EQ(std::string(error.what()).find(folder / "a"), 0U) << error.what();
    }
    EXPECT_EQ(store.stats().used_bytes, 0);
  }
}

// Random flips and cuts, half of them with a valid checksum of the header: an error of the right
// class, or the very image.
TEST(ImageFile, SurvivesRandomDamage) {
  const Bytes valid = small_file();
  const int fd = memfd_create("image", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  HostStore store(host_device(), kBudget);
  const auto original = small_image(store);
  std::mt19937 random(11);
  int intact = 0;
  for (int step = 0; step < 30'000; ++step) {
    Bytes bytes = valid;
    const std::size_t header = step % 3 == 0 ? bytes.size() : 166;
    const unsigned flips = random() % 4;
    for (unsigned i = 0; i < flips; ++i) {
      const std::size_t at = random() % header;
      const unsigned kind = random() % 3;
      bytes[at] = kind == 0 ? static_cast<char>(random())
                            : static_cast<char>(bytes[at] ^ 1 << random() % 8);
      if (kind == 2 && at + 4 <= bytes.size()) put(bytes, at, 0xFFFFFFFFU >> random() % 32);
    }
    if (step % 2 == 0) sign(bytes);
    if (random() % 16 == 0) bytes.resize(random() % (bytes.size() + 64));
    ASSERT_EQ(ftruncate(fd, 0), 0);
    ASSERT_EQ(pwrite(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    HostStore other(host_device(), kBudget);
    try {
      const auto image = read_image(other, path);
      if (bytes == valid) {
        ++intact;
        expect_equal(*image, *original);
      } else {
        ASSERT_EQ(step % 2, 0) << step;  // a signed header says something else
      }
    } catch (const Error& error) {
      ASSERT_NE(bytes, valid) << step << error.what();
      ASSERT_TRUE(error.status() == Status::format || error.status() == Status::unsupported)
          << step << error.what();
      ASSERT_EQ(other.stats().used_bytes, 0) << step;
    }
  }
  EXPECT_GT(intact, 1'000);
  close(fd);
}

TEST(ImageFile, AStoreThatIsFullFailsOrWaits) {
  const TemporaryFolder folder;
  HostStore store(host_device(), kBudget);
  const auto image = small_image(store);
  write_image(*image, folder / "a");
  HostStore full(host_device(), image->layout().bytes());
  auto held = testing::add_image(full, layout_of_bytes(64), "held");
  TOPPINGS_EXPECT_ERROR(read_image(full, folder / "a"), store_full);
  TOPPINGS_EXPECT_ERROR(read_image(full, folder / "a", nullptr, std::chrono::milliseconds(5)),
                        store_full);
  std::thread holder([&] {
    while (full.stats().waiting == 0) std::this_thread::yield();
    held.reset();
  });
  const auto read = read_image(full, folder / "a", nullptr, std::chrono::hours(1));
  holder.join();
  expect_equal(*read, *image);
}

// Something happens to the file, or to the read, between its header and its layers: the store holds
// it there, until `held` goes.
void disturb(const std::function<void(const std::string& path, ReadProgress&)>& disturbance,
             Status expected) {
  const TemporaryFolder folder;
  const std::string path = folder / "a";
  write_bytes(path, small_file());
  const std::int64_t bytes = read_image_header(path).layout.bytes();
  HostStore store(host_device(), bytes);
  auto held = testing::add_image(store, layout_of_bytes(64), "held");
  store.erase("held");
  ReadProgress progress;
  std::thread other([&] {
    while (store.stats().waiting == 0) std::this_thread::yield();
    EXPECT_EQ(progress.bytes_total, bytes);
    disturbance(path, progress);
    while (progress.cancel && store.stats().waiting != 0) std::this_thread::yield();
    held.reset();
  });
  try {
    read_image(store, path, nullptr, std::chrono::hours(1), &progress);
    ADD_FAILURE() << "expected an error, got none";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), expected) << error.what();
  }
  other.join();
  EXPECT_EQ(store.stats().used_bytes, 0);
  EXPECT_EQ(store.stats().images, 0);
  testing::add_image(store, layout_of_bytes(bytes), "next");
}

TEST(ImageFile, FilesThatChangeWhileTheyAreReadAreRefused) {
  disturb([](const std::string& path, ReadProgress&) { std::filesystem::resize_file(path, 4500); },
          Status::format);
  disturb([](const std::string& path, ReadProgress&) { std::filesystem::resize_file(path, 0); },
          Status::format);
  disturb(
      [](const std::string& path, ReadProgress&) {
        std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
        file.seekp(5000).put('\7');
      },
      Status::format);
}

TEST(ImageFile, CancellingEndsTheWaitForRoom) {
  disturb([](const std::string&, ReadProgress& progress) { progress.cancel = true; },
          Status::cancelled);
}

TEST(ImageFile, CancellingEndsTheReadBeforeTheNextPiece) {
  const TemporaryFolder folder;
  write_bytes(folder / "a", small_file());
  HostStore store(host_device(), kBudget);
  ReadProgress progress;
  progress.cancel = true;
  TOPPINGS_EXPECT_ERROR(read_image(store, folder / "a", nullptr, {}, &progress), cancelled);
  EXPECT_EQ(progress.bytes_read, 0);
  EXPECT_EQ(store.stats().used_bytes, 0);
}

}  // namespace
}  // namespace toppings
